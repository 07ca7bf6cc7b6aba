#!/usr/bin/env bash
# Renews constraints.txt (`make renew`): the newest versions that the bounds of pyproject.toml allow are resolved for all
# Pythons and platforms, installed for this one, and kept only if lint and tests pass with them.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=.venv-renew
new=$environment/constraints.txt

"${PYTHON:-python3}" -m venv --clear $environment
$environment/bin/python -m pip install --quiet --upgrade pip uv

# resolve [REQUIREMENT...]: into $new; besides the package's own requirements, pip and what the package is built with.
resolve() {
  printf '%s\n' pip 'scikit-build-core>=0.10' cmake ninja "$@" |
    $environment/bin/uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate \
      --extra train --extra dev --output-file $new pyproject.toml -
}
resolve
# torchvision 0.N is made for torch 2.(N - 15), and does not say that no later one will do.
minor=$(sed -n 's/^torchvision==0\.\([0-9]*\)\..*/\1/p' $new | sort -n | head -1)
resolve "torchvision==0.$minor.*" "torch==2.$((minor - 15)).*"

$environment/bin/python -m pip install --quiet --upgrade --constraint $new pip
$environment/bin/python -m pip install --quiet --constraint $new --build-constraint $new --editable '.[train,dev]'
touch $environment/.installed
make VENV=$environment lint test

{
  echo "# Written by \`make renew\`; do not edit. Lint and tests passed with these versions on"
  $environment/bin/python -c 'import platform, time
print(f"# Python {platform.python_version()}, {platform.system()} {platform.machine()}, {time.strftime("%Y-%m-%d")}; other lines are resolved alone.")'
  cat $new
} >constraints.new
mv constraints.new constraints.txt
echo "constraints.txt renewed. Commit it, and run \`make test-slow\` too."
