"""benchmarks.gpu but for the launches: arguments, correctness checks, tables, CSV, plot, on a stand-in for the GPU."""

import csv

import pytest
import torch

import gpu_rehearsal
from benchmarks import bench_group_attention, gpu, gpu_report, inputs_attention
from benchmarks.shapes import DEFAULT_ATTENTION, AttentionShape, GroupShape, VocabularyShape


class StandIn:
    """Times nothing: each entry takes a millisecond more than the one before."""

    name, device = "Stand-in GPU (40 GB)", "cpu"

    def __init__(self):
        self.asked = []

    def seconds(self, entry, budget):
        self.asked.append(entry.name)
        return gpu.Timing(1e-3 * len(self.asked), 1e-5, 3)

    def rate(self, dtype):
        return 1e12


ATTENTION = [AttentionShape(DEFAULT_ATTENTION[0], 1, 7, 1, 32, 3, 16, 48, text=11)]
VOCABULARY = [VocabularyShape("tiny", 2, 6, 16, 131, 2, 3)]
SHAPES = {
    "frame_mass": ATTENTION,
    "frame_attention": ATTENTION,
    "group_attention": [GroupShape("tiny", 40, 9, 3, 4, 2, 32)],
    "token_logprobs": VOCABULARY,
    "group_divergence": VOCABULARY,
    "weighted_surrogate": VOCABULARY,
    "logits_weighted_surrogate": VOCABULARY,
    "linear_weighted_surrogate": VOCABULARY,
}


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(inputs_attention, "flex", lambda work: (None, "takes a minute to compile"))
    monkeypatch.setattr(bench_group_attention, "flex_attention", lambda seen, inputs: (None, "as above"))


def test_every_operator_is_checked_timed_and_written(tmp_path, capsys):
    rows = gpu.main(["--out", str(tmp_path), "--dtype", "float32"], StandIn(), SHAPES)
    assert {row.op.split()[0] for row in rows} >= {
        "frame_mass",
        "frame_attention",
        "group_attention",
        "token_logprobs",
        "group_divergence",
        "group_divergence_from_logits",
        "weighted_surrogate",
        "logits_weighted_surrogate",
        "linear_weighted_surrogate",
    }
    assert set(gpu.FLOP) <= {row.op for row in rows}
    for op in {row.op for row in rows}:
        assert any(row.role == "ours" for row in rows if row.op == op)
    with (tmp_path / "stand-in-gpu-40-gb.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["name"] for row in written] == [row.name for row in rows]
    assert (tmp_path / "stand-in-gpu-40-gb.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "x bound" in printed and "not run:" in printed
    limited = [row for row in rows if row.role == "bound"]
    assert limited and all(row.to_bound == 1.0 for row in limited)
    own = next(row for row in rows if row.op == "frame_mass" and row.role == "ours")
    assert own.tensor_fraction == pytest.approx(ATTENTION[0].replay_flop / (own.milliseconds / 1e3) / 1e12)


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch):
    from benchmarks import bench_frame_mass

    def wrong(*arguments, **options):
        raise AssertionError("frame_mass: error 1 against fp64")

    monkeypatch.setattr(bench_frame_mass, "check", wrong)
    machine = StandIn()
    with pytest.raises(SystemExit, match=r"\d cases failed: frame_mass"):
        gpu.main(["frame_mass", "weighted_surrogate", "--out", str(tmp_path)], machine, SHAPES)
    assert machine.asked and not any("frame" in name for name in machine.asked)  # the others are timed and written
    page = (tmp_path / "stand-in-gpu-40-gb.md").read_text()
    assert "weighted_surrogate" in page and "failed: AssertionError: frame_mass: error 1 against fp64" in page


def test_a_run_goes_on_where_it_ended(tmp_path):
    arguments = ["weighted_surrogate", "token_logprobs", "--dtype", "float32", "--out", str(tmp_path)]
    first = gpu.main(arguments[:1] + arguments[2:], StandIn(), SHAPES)
    machine = StandIn()
    rows = gpu.main(arguments, machine, SHAPES)
    assert rows[: len(first)] == first and len(rows) > len(first)
    assert not any(row.op == "weighted_surrogate" for row in rows[len(first) :])
    again = StandIn()
    gpu.main([*arguments, "--again"], again, SHAPES)
    assert len(again.asked) > len(machine.asked)


def test_time_runs_out(tmp_path):
    machine = StandIn()
    assert gpu.main(["weighted_surrogate", "--minutes", "0", "--out", str(tmp_path)], machine, SHAPES) == []
    assert len(machine.asked) == 0
    assert "0 minutes were over; run again" in (tmp_path / "stand-in-gpu-40-gb.md").read_text()


def test_on_the_pretended_gpu(tmp_path, monkeypatch):
    """As on a GPU, with every backend that one has; compiled peers and the vendor's rate are left out."""
    monkeypatch.setattr(gpu, "attention_peers", lambda *arguments: None)
    monkeypatch.setattr(gpu, "CACHE_BYTES", 1 << 10)
    monkeypatch.setattr(gpu.Gpu, "rate", lambda self, dtype: 1e12)
    with gpu_rehearsal.rehearse() as recording:
        arguments = ["frame_attention", "--dtype", "bfloat16", "--seconds", "0", "--out"]
        rows = gpu.main([*arguments, str(tmp_path)], shapes=SHAPES)
    assert {row.op for row in rows} == {"frame_attention", "frame_attention backward"}
    named = {row.name for row in rows if row.op == "frame_attention"}
    assert {"ours, cuda, fused", "ours, triton, fused", "ours, torch, fused"} & named >= {"ours, triton, fused"}
    assert {row.shape for row in rows if row.op == "frame_attention"} >= {f"{DEFAULT_ATTENTION[0].split('/')[0]}/of 60"}
    assert all(row.milliseconds == 1.0 and row.host_milliseconds > 0 for row in rows)
    assert not recording.of_kind("mixed") and not recording.of_kind("refused")


def test_arguments(tmp_path):
    with pytest.raises(SystemExit):
        gpu.main(["no_such_operator"], StandIn(), SHAPES)
    rows = gpu.main(["frame_mass", "--dtype", "bfloat16", "--out", str(tmp_path)], StandIn(), SHAPES)
    assert {row.dtype for row in rows} == {"bfloat16"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main([])


def test_the_order_of_backends_is_what_was_measured():
    """The longer of GPU and host counts, both calls of a backend are added up, what ran alone says nothing."""

    def row(op, name, gpu_time, host, scores, dtype="bfloat16"):
        return gpu_report.Row("H", op, "s", dtype, name, "ours", gpu_time, host, 1, None, None, scores)

    rows = [
        row("frame_mass", "ours, triton, lse given", 0.1, 0.6, 1000),
        row("frame_mass", "ours, cuda, lse given", 0.2, 0.1, 1000),
        row("frame_mass", "ours, triton, lse given", 5.0, 0.6, 100_000),
        row("frame_mass", "ours, triton, lse computed", 1.0, 0.6, 100_000),
        row("frame_mass", "ours, cuda, lse given", 4.0, 0.1, 100_000),
        row("frame_mass", "ours, cuda, lse computed", 3.0, 0.1, 100_000),
        row("frame_mass", "ours, triton, lse given", 1.0, 0.6, 1000, "float32"),
        row("frame_attention", "ours, flash and frame_mass", 1.0, 0.6, 1000),
        row("group_divergence", "ours, triton", 1.0, 0.6, 0),
    ]
    rules = gpu_report.backend_rules(rows, "9.0")
    assert [(r.operator, r.dtype, r.most_scores, r.order) for r in rules] == [
        ("frame_mass", "bfloat16", 10_000, ("cuda", "triton")),
        ("frame_mass", "bfloat16", float("inf"), ("triton", "cuda")),
    ]
