# The emulator of the guests: QEMU as a Debian release has it, in the cache with the libraries it loads, so that it is
# the same one on every machine. Sourced by run.
#
# cache/qemu/qemu-system-x86_64  starts it
#
# The 7.2 of the release before takes 1.4 times the CPU time for the same tests.

qemu_suite=main:trixie

qemu_ensure() {
    cache_ensure qemu qemu_fetch
    emulator=$cache/qemu/qemu-system-x86_64
}

qemu_fetch() {
    local libraries
    say "fetching QEMU"
    cache_scratch QEMU
    apt_open "$tmp/apt" "$qemu_suite" amd64
    apt_unpack "$tmp/all" qemu-system-x86
    mkdir -p "$tmp/new"/{bin,lib,share}
    cp "$tmp/all/usr/bin/qemu-system-x86_64" "$tmp/new/bin"
    (cd "$tmp/all/usr/share" && cp -L qemu/{kvmvapic,linuxboot_dma}.bin seabios/bios-256k.bin "$tmp/new/share")
    libraries=$tmp/all/usr/lib/x86_64-linux-gnu
    "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" --list "$tmp/new/bin/qemu-system-x86_64" |
        awk '/ => \// { print $3 }' | xargs cp -L -t "$tmp/new/lib"
    # By the loader's own option, as LD_LIBRARY_PATH would be that of all that QEMU starts.
    cat >"$tmp/new/qemu-system-x86_64" <<'QEMU'
#!/bin/sh
root=${0%/*}
exec "$root/lib/ld-linux-x86-64.so.2" --library-path "$root/lib" "$root/bin/qemu-system-x86_64" -L "$root/share" "$@"
QEMU
    chmod +x "$tmp/new/qemu-system-x86_64"
    rm -rf "$cache/qemu"
    mv -T "$tmp/new" "$cache/qemu"
}
