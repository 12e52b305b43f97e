#!/usr/bin/env bash
# Collects the file system of an image that holds one program and what it needs to run: its libraries, wherever the loader finds them,
# certificates of authorities, and a user.
#   docker/root.sh BINARY OUT [FOLDER-OF-LIBRARIES [LIBRARY-LOADED-AT-START...]]
set -euo pipefail
binary=$1
out=$2
folder=${3:-}
loaded=("${@:4}")

mkdir -p "$out"/{etc/ssl/certs,usr/bin,tmp,var/lib/superbatch,home/superbatch,usr/share/licenses/superbatch}
install -m 0755 "$binary" "$out/usr/bin/superbatch"
strip --strip-debug "$out/usr/bin/superbatch" 2>/dev/null || true

# Names of libraries as the loader resolves them, the loader itself among them.
needed() { LD_LIBRARY_PATH=$folder ldd "$@" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^[[:space:]]*\(\/[^ ]*ld-linux[^ ]*\) .*/\1/p' | sort -u; }
missing() { LD_LIBRARY_PATH=$folder ldd "$@" | sed -n 's/^[[:space:]]*\(.*\) => not found/\1/p' | sort -u; }

if [ -n "$(missing "$binary" "${loaded[@]}")" ]; then
  echo "root.sh: libraries are missing: $(missing "$binary" "${loaded[@]}" | tr '\n' ' ')" >&2
  # The driver's come from the host, with the NVIDIA runtime.
  missing "$binary" "${loaded[@]}" | grep -vq '^libcuda\.so' && exit 1
fi
for library in $(needed "$binary" "${loaded[@]}") "${loaded[@]}"; do
  # At the path where it was found: libraries of wheels look for each other by relative paths.
  mkdir -p "$out$(dirname "$library")"
  cp -L "$library" "$out$library"
done
# Loaded by name while it runs: kernels that are compiled at start.
for library in "$folder"/../../nvidia/*/lib/libnvrtc*.so*; do
  if [ -e "$library" ] && [ "${#loaded[@]}" -gt 0 ]; then
    library=$(realpath "$library")
    mkdir -p "$out$(dirname "$library")"
    cp "$library" "$out$library"
  fi
done

cp /etc/ssl/certs/ca-certificates.crt "$out/etc/ssl/certs/"
cp "$(dirname "$0")/LICENSE" "$out/usr/share/licenses/superbatch/" 2>/dev/null || cp LICENSE "$out/usr/share/licenses/superbatch/"
echo 'superbatch:x:65532:65532:superbatch:/home/superbatch:/nonexistent' > "$out/etc/passwd"
echo 'superbatch:x:65532:' > "$out/etc/group"
echo 'hosts: files dns' > "$out/etc/nsswitch.conf"
chmod 1777 "$out/tmp"
chown -R 65532:65532 "$out/home/superbatch" "$out/var/lib/superbatch"
