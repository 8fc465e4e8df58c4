# What this machine must have, installed through apt where it is missing.
# Sourced by run.

# A|B: B will do when it is there already; A is what gets installed.
packages_guest="qemu-system-x86 busybox-static|busybox cpio kmod xz-utils zstd util-linux mount
    dmsetup e2fsprogs strace debian-archive-keyring"
packages_udev="udev dmsetup"
packages_fio="fio fsverity"
packages_arm64="qemu-system-arm binutils"
packages_arm64_build="gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
# bindgen, which devicemapper's build runs, loads libclang and reads clang's
# own headers and libdevmapper's. Constants are compared with linux-libc-dev's.
packages_build="gcc libc6-dev linux-libc-dev pkg-config|pkgconf libdevmapper-dev libclang-dev ca-certificates"

apt_updated=0

apt_install() {
    say "installing: $*"
    ((EUID == 0)) || die "that takes root"
    apt_update
    DEBIAN_FRONTEND=noninteractive apt-get -q -q -y -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 \
        install --no-install-recommends "$@" >&2 || die "cannot install: $*"
}

apt_update() {
    ((apt_updated == 0)) || return 0
    # A source that has nothing to do with us may be out of order.
    apt-get -q -q -o DPkg::Lock::Timeout=600 update >&2 || say "apt-get update failed; going on with what is known"
    apt_updated=1
}

# host_packages A B|C ... ; installs what is missing of them.
host_packages() {
    local installed package missing=()
    # shellcheck disable=SC2016
    installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' | sed -n 's/ installed$//p')
    for package in "$@"; do
        grep -qxE "$package" <<<"$installed" || missing+=("${package%%|*}")
    done
    ((${#missing[@]} == 0)) || apt_install "${missing[@]}"
}

# shellcheck disable=SC2086
host_guest() {
    host_packages $packages_guest
    ((guest_udev == 0)) || host_packages $packages_udev
    ((guest_fio == 0)) || host_packages $packages_fio
    ! guest_is_arm64 || host_packages $packages_arm64
}

# shellcheck disable=SC2086
host_build() {
    host_packages $packages_build
    host_rust
}

# Debian has Rust in two sets of packages; the one made for building web
# browsers is the newer one in a stable release.
rust_sets=("rustc-web cargo-web rustfmt-web rust-web-clippy" "rustc cargo rustfmt rust-clippy")

host_rust() {
    local want set version
    PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
    ! type -P cargo >/dev/null || return 0
    want=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$root/Cargo.toml")
    apt_update
    for set in "${rust_sets[@]}"; do
        version=$(apt-cache policy "${set%% *}" | sed -n 's/^ *Candidate: //p')
        if dpkg --compare-versions "${version:-0}" ge "${want:-0}"; then
            # shellcheck disable=SC2086
            apt_install $set
            return 0
        fi
    done
    die "no cargo on PATH, and apt has no rustc of version $want or later; install one (rustup will do)"
}

# rustfmt and clippy, for a cargo that came without them.
host_lints() {
    local set
    if cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1; then
        return 0
    fi
    for set in "${rust_sets[@]}"; do
        if dpkg-query -W "${set%% *}" >/dev/null 2>&1 && [[ $(type -P cargo) == /usr/bin/cargo ]]; then
            # shellcheck disable=SC2086
            apt_install $set
            return 0
        fi
    done
    die "this cargo has no rustfmt or no clippy (with rustup: rustup component add rustfmt clippy)"
}
