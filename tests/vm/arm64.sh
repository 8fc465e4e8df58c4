# What is done for arm64: a cross build by the oldest compiler that dmsnap
# promises to build with, and the guest's machine and user land. Sourced by run.

arm64_target=aarch64-unknown-linux-gnu

# The packages that image.sh takes the guest's tools from.
arm64_packages="bash busybox-static coreutils dash dmsetup e2fsprogs findutils kmod mount strace util-linux"

# Both come from the suite whose compiler is of the version that Cargo.toml
# names, so that what is promised to be the oldest is what is tried.
rust_suite=main:bookworm

# Called in guest_boot, whose variables it sets.
arm64_machine() {
    machine=(qemu-system-aarch64 -machine virt)
    # Without the pointer authentication of `max`, which costs much to emulate.
    cpu=neoverse-n1
    append=${append/ttyS0/ttyAMA0}
    append=${append/trust_cpu/trust_bootloader}
}

arm64_tools_fetch() {
    say "fetching arm64's user land"
    cache_scratch "arm64's user land"
    apt_open "$tmp/apt" "main:bookworm security:bookworm-security" arm64
    # shellcheck disable=SC2086
    apt_unpack "$tmp/new" $arm64_packages
    rm -rf "$tmp/new"/usr/share/{doc,man,info,locale}
    mv -T "$tmp/new" "$cache/arm64-tools"
}

# What ldd does for programs that this machine can run.
arm64_copy_libraries() {
    local tree=$1 root=$cache/arm64-tools/usr/lib name path
    local -A seen=()
    shift
    while (($# > 0)); do
        path=$1
        shift
        for name in $(readelf -d "$path" 2>/dev/null | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
            [[ -z ${seen[$name]:-} ]] || continue
            seen[$name]=1
            path=$root/aarch64-linux-gnu/$name
            [[ $name != ld-linux-* ]] || path=$root/$name
            [[ -e $path ]] || die "arm64's user land has no $name"
            mkdir -p "$tree/usr/lib/aarch64-linux-gnu"
            cp -L "$path" "$tree${path#"$cache/arm64-tools"}"
            set -- "$@" "$path"
        done
    done
    # The loader, by the path that programs name it by.
    cp -L "$root/ld-linux-aarch64.so.1" "$tree/usr/lib/"
}

rust_version() {
    sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$root/Cargo.toml"
}

rust_fetch() {
    local version=$1 have deb
    say "fetching Rust $version"
    cache_scratch "Rust $version"
    apt_open "$tmp/apt" "$rust_suite" amd64 arm64
    have=$(apt_private apt-cache policy rustc-web | sed -n 's/^ *Candidate: //p')
    [[ $have == "$version".* ]] || die "$rust_suite has Rust $have, not $version"
    # What the compiler loads, the C library too: this machine's may be older.
    apt_unpack "$tmp/new" "libstd-rust-web-$version"
    mkdir "$tmp/debs"
    (cd "$tmp/debs" && apt_private apt-get -q -q download rustc-web libstd-rust-web-dev libstd-rust-web-dev:arm64) >&2
    for deb in "$tmp"/debs/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -C "$tmp/new" --keep-directory-symlink --no-same-owner -xf -
    done
    rm -rf "$tmp/new"/usr/share
    # By the loader's own option, as LD_LIBRARY_PATH would be the linker's too.
    cat >"$tmp/new/rustc" <<'RUSTC'
#!/bin/sh
root=${0%/*}
libraries=$root/usr/lib/x86_64-linux-gnu
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$root/usr/bin/rustc" --sysroot "$root/usr" "$@"
RUSTC
    chmod +x "$tmp/new/rustc"
    mv -T "$tmp/new" "$cache/rust-$version"
}

# cargo with the oldest compiler. What the two compilers build does not mix.
oldest_cargo() {
    local version
    version=$(rust_version)
    cache_ensure "rust-$version" rust_fetch "$version" || return 1
    RUSTC=$cache/rust-$version/rustc CARGO_TARGET_DIR=$target_dir/rust-$version \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc cargo "$@"
}

arm64_features=serde,tracing,cli

# Where the command line for arm64 is, built or not.
arm64_cli() {
    echo "$target_dir/rust-$(rust_version)/$arm64_target/release/dmsnap"
}

# The command line and the kernel tests for arm64, by the oldest compiler: built and linked, not to be run.
build_arm64() {
    # shellcheck disable=SC2086
    host_packages $packages_arm64_build
    CARGO_PROFILE_TEST_OPT_LEVEL=0 oldest_cargo build --locked --target "$arm64_target" --no-default-features \
        --features "$arm64_features" --bin dmsnap --test kernel
}

# The same, as its guest runs them.
build_arm64_kernel_tests() {
    local path
    # shellcheck disable=SC2086
    host_packages $packages_arm64_build
    oldest_cargo build --release --locked --target "$arm64_target" --no-default-features --features cli --bin dmsnap ||
        return 1
    mkdir -p "$target_dir/vm/arm64"
    path=$(build_target_by oldest_cargo test kernel test --no-run --target "$arm64_target" \
        --no-default-features --features "$arm64_features" --test kernel) || return 1
    cp "$path" "$target_dir/vm/arm64/kernel"
}
