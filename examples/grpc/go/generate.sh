#!/bin/sh
# Generates superbatchv1/, messages and stubs, from the .proto files alone. It needs protoc on the path (apt-get install
# protobuf-compiler, or https://protobuf.dev); its two plugins come from go.mod.
set -eu
cd "$(dirname "$0")"
proto=${PROTO:-../../../proto}
package=example.com/superbatch-client/superbatchv1
GOBIN=$PWD/bin go install tool
PATH=$PWD/bin:$PATH exec protoc -I "$proto" \
  --go_out=. --go_opt=module=example.com/superbatch-client,Msuperbatch/v1/selection.proto=$package \
  --go-grpc_out=. --go-grpc_opt=module=example.com/superbatch-client,Msuperbatch/v1/selection.proto=$package \
  superbatch/v1/selection.proto
