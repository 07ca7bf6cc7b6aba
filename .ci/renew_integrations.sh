#!/usr/bin/env bash
# Renews tests/integrations/constraints/ (`make renew-integrations`): for each other trainer the newest versions that the
# bounds of pyproject.toml allow beside torch of constraints.txt. Kept only if the trainers' tests pass with them.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=.venv-renew
folder=tests/integrations/constraints
old=$(mktemp -d)

"${PYTHON:-python3}" -m venv --clear $environment
$environment/bin/python -m pip install --quiet --upgrade pip uv
grep -E '^torch(vision)?==' constraints.txt >$environment/torch.txt
cp $folder/*.txt "$old"
trap 'cp "$old"/*.txt $folder' ERR

# renew TRAINER EXTRA...: besides these, what the tests need and what the package is built with. TRL needs Python 3.11.
renew() {
  {
    echo "# Written by \`make renew-integrations\`; do not edit. \`make test-integrations\` has passed with these versions."
    printf '%s\n' pip 'scikit-build-core>=0.10' cmake ninja av torchvision |
      $environment/bin/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
        $(printf -- '--extra %s ' "${@:2}") --constraint $environment/torch.txt pyproject.toml -
  } >$environment/constraints.txt
  mv $environment/constraints.txt $folder/"$1".txt
}
renew trl train dev trl
renew verl dev verl
renew swift dev swift

make test-integrations
echo "$folder renewed. Commit it."
