# The guest's initramfs: a user land copied from this machine, the kernel's
# modules from the cache, and what one run adds. Sourced by run.
#
# The user land is packed anew each time. That takes a few tenths of a second
# and leaves no cache to go stale when the machine is upgraded.

# Real tools; busybox has all the rest. Debian's busybox prefers its own
# applets to what PATH holds, losetup for one, so whatever starts programs is
# among the real ones: shells, env, timeout and so on.
guest_tools="losetup blockdev blkdiscard dmsetup mke2fs e2fsck strace kmod mount umount date
    dash bash env timeout nice nohup chroot find xargs setsid flock taskset unshare"

cpio_pack() {
    (cd "$1" && find . -mindepth 1 -print0 | LC_ALL=C sort -z | cpio --null --quiet -o -H newc -R 0:0)
}

# The path of a tool, also when PATH lacks sbin, as a plain user's does.
tool() {
    if guest_is_arm64; then
        PATH=$cache/arm64-tools/usr/bin:$cache/arm64-tools/usr/sbin type -P "$1" || die "no $1 among arm64's tools"
        return 0
    fi
    PATH=$PATH:/usr/sbin:/sbin type -P "$1" || die "no $1 on this machine"
}

# Copies the shared libraries that the given programs need into a tree.
copy_libraries() {
    local tree=$1 libraries
    shift
    if guest_is_arm64; then
        arm64_copy_libraries "$tree" "$@"
        return 0
    fi
    # ldd fails on a static program, which is as well.
    libraries=$( (ldd "$@" 2>/dev/null || true) | awk '
        / => \// { print $3 }
        $1 ~ /^\// && $2 ~ /^\(0x/ { print $1 }' | sort -u)
    # shellcheck disable=SC2086
    [[ -z $libraries ]] || (cd / && cp -L --parents $libraries "$tree")
}

image_skeleton() {
    local tree=$1 dir
    mkdir -p "$tree"/{dev,proc,sys,run,tmp,root,mnt,etc,vm/work,var} \
        "$tree"/usr/{bin,lib,lib64,share,local/bin}
    for dir in bin sbin lib lib64; do
        ln -s "usr/$dir" "$tree/$dir"
    done
    ln -s bin "$tree/usr/sbin"
    ln -s ../run "$tree/var/run"
    ln -s ../tmp "$tree/var/tmp"
    cp "$here/init" "$tree/init"
    # udev's rules name groups, and devtmpfs shows their numbers.
    cp /etc/passwd /etc/group "$tree/etc"
    guest_is_arm64 || [[ ! -e /etc/ld.so.cache ]] || cp /etc/ld.so.cache "$tree/etc"
    [[ ! -e /etc/mke2fs.conf ]] || cp /etc/mke2fs.conf "$tree/etc"
}

image_tools() {
    local tree=$1 name path busybox paths=()
    busybox=$(tool busybox)
    paths+=("$busybox")
    cp -L "$busybox" "$tree/usr/bin/busybox"
    # One ln for all of them: each applet's name, beside busybox, is a link to it.
    # This machine's busybox says which there are, as it can be run.
    (cd "$tree/usr/bin" && busybox --list | grep -vx busybox | xargs -n 1 ln -s busybox)
    for name in $guest_tools; do
        path=$(tool "$name")
        paths+=("$path")
        cp -L --remove-destination "$path" "$tree/usr/bin/$name"
    done
    ln -sf dash "$tree/usr/bin/sh"
    for name in modprobe rmmod insmod lsmod modinfo depmod; do
        ln -sf kmod "$tree/usr/bin/$name"
    done
    for name in mkfs.ext2 mkfs.ext3 mkfs.ext4; do
        ln -sf mke2fs "$tree/usr/bin/$name"
    done
    copy_libraries "$tree" "${paths[@]}"
}

# udevd with the rules that Debian's udev and dmsetup packages bring, not
# those that other packages of this machine may have added.
image_udev() {
    local tree=$1 files
    files=$(dpkg -L udev dmsetup | grep -E '/udev/(rules\.d/[^/]+\.rules|[a-z0-9_]+|udev\.conf)$' | while read -r path; do
        [[ ! -f $path ]] || echo "$path"
    done)
    # shellcheck disable=SC2086
    (cd / && cp --parents $files "$tree")
    cp -L "$(tool udevadm)" "$tree/usr/bin/udevadm"
    mkdir -p "$tree/usr/lib/systemd"
    ln -s ../../bin/udevadm "$tree/usr/lib/systemd/systemd-udevd"
    # shellcheck disable=SC2046
    copy_libraries "$tree" "$(tool udevadm)" $(find "$tree/usr/lib/udev" -maxdepth 1 -type f)
    touch "$tree/vm/udev"
}

# Adds files to COMMAND's directory, with their libraries.
image_files() {
    local tree=$1 file
    shift
    for file in "$@"; do
        [[ -f $file && -r $file ]] || die "cannot read $file"
        cp -L --preserve=mode,timestamps "$file" "$tree/vm/work/"
    done
    (($# == 0)) || copy_libraries "$tree" "$@"
    file=$target_dir/release/dmsnap
    ! guest_is_arm64 || file=$(arm64_cli)
    if [[ -x $file ]]; then
        cp "$file" "$tree/usr/local/bin/"
        copy_libraries "$tree" "$file"
    fi
}

# Writes COMMAND down as shell, each word in single quotes, so that it arrives
# as it was given.
image_command() {
    local word
    printf 'exec'
    for word in "$@"; do
        printf " '%s'" "${word//\'/\'\\\'\'}"
    done
    printf '\n'
}

# image_build FILE SERIES UDEV COMMAND... ; reads the array guest_files.
image_build() {
    local file=$1 series=$2 udev=$3 tree=$1.tree
    shift 3
    image_skeleton "$tree"
    image_tools "$tree"
    ((udev == 0)) || image_udev "$tree"
    image_files "$tree" "${guest_files[@]}"
    [[ -z $guest_out ]] || touch "$tree/vm/want-out"
    image_command "$@" >"$tree/vm/command"
    { cpio_pack "$tree" && cat "$cache/kernels/$series/modules.cpio"; } >"$file"
    rm -rf "$tree"
}
