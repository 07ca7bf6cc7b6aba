"""benchmarks.gpu but for the launches: arguments, correctness checks, tables, CSV, plot, on a stand-in for the GPU."""

import csv

import pytest
import torch

from benchmarks import bench_group_attention, gpu, inputs_attention
from benchmarks.shapes import DEFAULT_ATTENTION, AttentionShape, GroupShape, VocabularyShape


class StandIn:
    """Times nothing: each contestant takes a millisecond more than the one before."""

    name, device = "Stand-in GPU (40 GB)", "cpu"

    def __init__(self):
        self.asked = []

    def seconds(self, contestant, budget):
        self.asked.append(contestant.name)
        return 1e-3 * len(self.asked), 3

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
    with pytest.raises(AssertionError, match="against fp64"):
        gpu.main(["frame_mass", "--out", str(tmp_path)], machine, SHAPES)
    assert not machine.asked


def test_arguments(tmp_path):
    with pytest.raises(SystemExit):
        gpu.main(["no_such_operator"], StandIn(), SHAPES)
    rows = gpu.main(["frame_mass", "--dtype", "bfloat16", "--out", str(tmp_path)], StandIn(), SHAPES)
    assert {row.dtype for row in rows} == {"bfloat16"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main([])
