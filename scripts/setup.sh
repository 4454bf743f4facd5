# shellcheck shell=bash
# What ./test and ./demo need on a fresh Debian 12. Sourced, not run.

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo -n "$@"
  else return 1; fi
}

# The packages of the programs that are not there.
missing_packages() {
  local pair
  for pair in cc:build-essential protoc:protobuf-compiler git:git cpio:cpio busybox:busybox-static mke2fs:e2fsprogs \
    ip:iproute2 depmod:kmod mmdebstrap:mmdebstrap qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || echo "${pair##*:}"
  done
  [ -e /usr/include/google/protobuf/any.proto ] || echo libprotobuf-dev
}

# unpack FOLDER PROGRAM PACKAGE...: unpacks packages into the cache for tests on this machine: installed, they would start servers.
# Tests that need what could not be had say SKIPPED.
unpack() {
  local folder=$1 program=$2 cache=${STEADFAST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/steadfast} new
  shift 2
  if [ -x "$cache/$folder/$program" ] || ! command -v apt-get >/dev/null; then return 0; fi
  mkdir -p "$cache" && new=$(mktemp -d "$cache/$folder.XXXXXX") || return 0
  # `_apt`, apt's own user, may not read the folder; downloading as the caller is what we want.
  if (cd "$new" && apt-get -o APT::Sandbox::User=root download -q "$@" &&
    for package in *.deb; do dpkg-deb -x "$package" . || exit 1; done && rm -- *.deb); then
    mv -T "$new" "$cache/$folder" 2>/dev/null || rm -rf "$new"
  else
    rm -rf "$new"
    echo "could not be had: $*; tests that need it will be skipped" >&2
  fi
}

unpack_etcd() {
  command -v etcd >/dev/null && command -v etcdctl >/dev/null && return 0
  unpack etcd usr/bin/etcd etcd-server etcd-client
}

# QEMU's guest agent, for the test that speaks with it.
unpack_agent() {
  PATH=$PATH:/usr/sbin command -v qemu-ga >/dev/null || unpack qemu-ga usr/sbin/qemu-ga qemu-guest-agent
}

# Installs what is missing. Fails only when something that building needs cannot be had.
install_packages() {
  unpack_etcd
  # Twice, because a package can push out another that was there (Debian's QEMU a newer qemu-utils from elsewhere).
  install_missing && install_missing
}

install_missing() {
  local packages
  mapfile -t packages < <(missing_packages)
  [ ${#packages[@]} -gt 0 ] || return 0
  echo "installing: ${packages[*]}"
  if command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    as_root apt-get update -q || true
    as_root apt-get install -qy --no-install-recommends "${packages[@]}" && return 0
    # A newer qemu-utils from elsewhere keeps Debian's QEMU out: take all of it from the release.
    as_root apt-get install -qy --no-install-recommends --allow-downgrades "${packages[@]}" \
      qemu-system-x86/bookworm qemu-system-common/bookworm qemu-system-data/bookworm qemu-utils/bookworm && return 0
  fi
  echo "could not install: ${packages[*]} (no Debian, no root, or no network). What needs them says so." >&2
  command -v cc >/dev/null
}

# Finds cargo, also where rustup put it for a shell that was not started anew.
need_rust() {
  if ! command -v cargo >/dev/null && [ -r "$HOME/.cargo/env" ]; then
    # shellcheck disable=SC1091
    . "$HOME/.cargo/env"
  fi
  command -v cargo >/dev/null && return 0
  echo "no Rust toolchain found. Install Rust 1.90 or newer from https://rustup.rs, then run this again." >&2
  return 1
}
