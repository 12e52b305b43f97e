#!/usr/bin/env bash
# Builds the tools that `make test-deploy` uses, once, from Go modules, into a cache outside the repository.
#   tests/deploy/tools.sh chart           helm, helm-unittest, kubeconform
#   tests/deploy/tools.sh control-plane   etcd, kube-apiserver, kube-controller-manager, and custom resources' definitions
#   tests/deploy/tools.sh http2           h2spec
#   tests/deploy/tools.sh where           prints the folder of the binaries
# Each tool is built at the version below; one that is there already is left alone. The chart's tools take about 3 minutes of one
# core, the control plane about 10.
set -euo pipefail

HELM=v3.22.0
UNITTEST=v1.1.2
YAML_JSONPATH="github.com/vmware-labs/yaml-jsonpath=github.com/helm-unittest/yaml-jsonpath@v0.4.0" # the one that its module asks for
KUBECONFORM=v0.8.0
H2SPEC=v2.2.1+incompatible
KUBERNETES=v1.34.4
ETCD=v3.6.16
KEDA=v2.21.0
PROMETHEUS_OPERATOR=v0.85.0
CERT_MANAGER=v1.21.2

cache=${SUPERBATCH_DEPLOY_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/superbatch/deploy-tools}
bin=$cache/bin

# One package at a time and behind everything else: such builds would otherwise take the machine.
go() { GOFLAGS="-mod=mod -p=${GO_PARALLEL:-1}" nice -n 15 go "$@"; }

# Builds PACKAGE at VERSION as NAME.
module() {
  local name=$1 package=$2 version=$3
  [ -x "$bin/$name-$version" ] || {
    echo "building $name $version" >&2
    local out
    out=$(mktemp -d "$cache/build.XXXXXX")
    GOBIN=$out go install "$package@$version"
    mv "$out"/* "$bin/$name-$version"
    rmdir "$out"
  }
  ln -sfn "$name-$version" "$bin/$name"
}

# As `module`, for a module that replaces others, which cannot be installed by its path: a module around it does the same.
wrapped() {
  local name=$1 module=$2 package=$3 version=$4 replace=$5
  ln -sfn "$name-$version" "$bin/$name"
  [ -x "$bin/$name-$version" ] && return 0
  echo "building $name $version" >&2
  local source=$cache/$name-$version
  rm -rf "$source"
  mkdir -p "$source"
  cd "$source"
  go mod init superbatch.test/wrapped 2>/dev/null
  go mod edit -replace "$replace"
  go get "$module@$version"
  go get "$package@$version"
  go build -ldflags '-s -w' -o "$bin/$name-$version" "$package"
}

# Kubernetes cannot be installed by its path: its module replaces its own parts by folders that only its repository has. A module
# around it replaces them by the versions that are published beside it.
kubernetes() {
  local source=$cache/kubernetes-$KUBERNETES needed=0 command
  for command in kube-apiserver kube-controller-manager; do
    ln -sfn "$command-$KUBERNETES" "$bin/$command"
    [ -x "$bin/$command-$KUBERNETES" ] || needed=1
  done
  [ "$needed" = 1 ] || return 0
  echo "building kube-apiserver and kube-controller-manager $KUBERNETES" >&2
  rm -rf "$source"
  mkdir -p "$source"
  cd "$source"
  go mod init superbatch.test/kubernetes 2>/dev/null
  go mod edit -require "k8s.io/kubernetes@$KUBERNETES"
  local manifest part
  manifest=$(go mod download -json "k8s.io/kubernetes@$KUBERNETES" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
  sed -n 's/^[[:space:]]*\(k8s\.io\/[a-z-]*\) v0\.0\.0\( .*\)\{0,1\}$/\1/p' "$manifest" | sort -u | while read -r part; do
    go mod edit -replace "$part=$part@v0.${KUBERNETES#v1.}"
  done
  cat > main.go <<'GO'
// Names the commands, so that their dependencies are resolved.
package main

import (
	_ "k8s.io/kubernetes/cmd/kube-apiserver/app"
	_ "k8s.io/kubernetes/cmd/kube-controller-manager/app"
)

func main() {}
GO
  go mod tidy
  for command in kube-apiserver kube-controller-manager; do
    go build -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$KUBERNETES" \
      -o "$bin/$command-$KUBERNETES" "k8s.io/kubernetes/cmd/$command"
  done
}

etcd() {
  ln -sfn "etcd-$ETCD" "$bin/etcd"
  [ -x "$bin/etcd-$ETCD" ] && return 0
  echo "building etcd $ETCD" >&2
  local source=$cache/etcd-$ETCD
  rm -rf "$source"
  mkdir -p "$source"
  cd "$source"
  go mod init superbatch.test/etcd 2>/dev/null
  cat > main.go <<'GO'
// The etcd server.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
GO
  go get "go.etcd.io/etcd/server/v3@$ETCD"
  go mod tidy
  go build -ldflags '-s -w' -o "$bin/etcd-$ETCD" .
}

# Definitions of the custom resources that the chart makes objects of, out of their operators' modules.
crds() {
  local stamp=$KEDA-$PROMETHEUS_OPERATOR-$CERT_MANAGER
  [ -e "$cache/crds/$stamp" ] && return 0
  rm -rf "$cache/crds"
  mkdir -p "$cache/crds"
  folder() { (cd "$cache" && go mod download -json "$1") | sed -n 's/.*"Dir": "\(.*\)".*/\1/p'; }
  cp "$(folder "github.com/kedacore/keda/v2@$KEDA")"/config/crd/bases/keda.sh_{scaledobjects,triggerauthentications}.yaml "$cache/crds"
  cp "$(folder "github.com/prometheus-operator/prometheus-operator@$PROMETHEUS_OPERATOR")"/example/prometheus-operator-crd/*_{servicemonitors,podmonitors,prometheusrules}.yaml "$cache/crds"
  cp "$(folder "github.com/cert-manager/cert-manager@$CERT_MANAGER")"/deploy/crds/cert-manager.io_certificates.yaml "$cache/crds"
  touch "$cache/crds/$stamp"
}

what=${1:-where}
mkdir -p "$bin"
case $what in
  where) echo "$bin" ;;
  chart)
    module helm helm.sh/helm/v3/cmd/helm "$HELM"
    wrapped helm-unittest github.com/helm-unittest/helm-unittest github.com/helm-unittest/helm-unittest/cmd/helm-unittest \
      "$UNITTEST" "$YAML_JSONPATH"
    module kubeconform github.com/yannh/kubeconform/cmd/kubeconform "$KUBECONFORM"
    ;;
  http2) module h2spec github.com/summerwind/h2spec/cmd/h2spec "$H2SPEC" ;;
  control-plane)
    crds
    etcd
    kubernetes
    ;;
  *)
    echo "usage: $0 chart|http2|control-plane|where" >&2
    exit 2
    ;;
esac
