#!/usr/bin/env bash
# Tests of what is deployed: the chart, the rules, the dashboard, the images' description. What needs a tool that is not here is
# skipped, and said loudly.
#   scripts/test-deploy.sh          with what can be built in a few minutes: part of `make test`
#   scripts/test-deploy.sh all      builds a Kubernetes control plane first (10 minutes of one core, once): `make test-deploy`
set -euo pipefail
cd "$(dirname "$0")/.."
python=${SUPERBATCH_PYTHON:-.venv/bin/python}
how=${1:-quick}
tools=tests/deploy/tools.sh
bin=$("$tools" where)
tests=()
skipped=()

has() { [ -x "$bin/$1" ] || command -v "$1" >/dev/null; }
skip() {
  echo "test-deploy: SKIPPED $1: $2" >&2
  skipped+=("$1")
}

if command -v go >/dev/null; then
  "$tools" http2 || skip "the build of h2spec" "it failed, as printed above"
  if [ "$how" = all ]; then
    "$tools" chart
    "$tools" control-plane
  elif ! "$tools" chart; then
    # A machine with Go and without its module proxy can still test the rest.
    skip "the build of the chart's tools" "it failed, as printed above"
  fi
fi
if has helm && has helm-unittest && has kubeconform; then
  tests+=(tests/deploy/test_chart.py tests/deploy/test_release.py)
else
  skip "the chart" "helm, helm-unittest and kubeconform are built where Go 1.26 is (https://go.dev)"
fi
if has helm && has etcd && has kube-apiserver && has kube-controller-manager && [ -d "$bin/../crds" ]; then
  tests+=(tests/deploy/test_apiserver.py)
else
  skip "a real API server" "\`make test-deploy\` builds one where Go is, once, in 10 minutes of one core"
fi
if has promtool; then
  tests+=(tests/deploy/test_monitoring.py)
else
  skip "rules and alerts" "promtool is missing: apt-get install prometheus (Debian), or https://prometheus.io/download"
fi
if has promtool && has prometheus; then
  tests+=(tests/deploy/test_live.py)
else
  skip "the dashboard on a live service" "prometheus is missing: apt-get install prometheus (Debian)"
fi
if has h2spec; then
  tests+=(tests/deploy/test_http2.py)
else
  skip "HTTP/2 as its specification has it" "h2spec is built where Go is (https://go.dev)"
fi
tests+=(tests/deploy/test_images.py)

"$python" -m pytest "${tests[@]}"
if [ "${#skipped[@]}" -gt 0 ]; then
  printf 'test-deploy: NOT TESTED here: %s\n' "${skipped[@]}" >&2
fi
