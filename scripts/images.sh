#!/usr/bin/env bash
# Builds the images: `make images`. With docker where there is one, else with buildah.
#   scripts/images.sh [TARGET...]       coordinator worker-cpu worker-cuda trainer-demo s3-demo
# REGISTRY=registry.example.com/ml names them so that they can be pushed. TAG: the version otherwise. IMAGE_ARGUMENTS: more options of
# the builder, such as `--build-arg BINARY=given`.
set -euo pipefail
cd "$(dirname "$0")/.."
targets=("$@")
[ "$#" -gt 0 ] || targets=(coordinator worker-cpu worker-cuda trainer-demo s3-demo)
version=$(sed -n '/^\[workspace.package\]/,/^$/s/^version = "\(.*\)"/\1/p' Cargo.toml)
tag=${TAG:-$version}
read -r -a arguments <<< "${IMAGE_ARGUMENTS:-}"
if command -v docker >/dev/null; then
  builder=(docker build)
elif command -v buildah >/dev/null; then
  read -r -a builder <<< "buildah ${BUILDAH_OPTIONS:-} bud"
else
  echo "images: neither docker nor buildah is here; get one of them (Debian: apt-get install buildah)." >&2
  exit 1
fi
for target in "${targets[@]}"; do
  name=${REGISTRY:+${REGISTRY%/}/}superbatch-$target:$tag
  echo "== $name"
  "${builder[@]}" "${arguments[@]}" --file docker/Dockerfile --target "$target" --tag "$name" \
    --label "org.opencontainers.image.revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)" .
done
