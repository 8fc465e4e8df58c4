# What the tests in tests/kernel/vmm boot from a snapshot inside a guest. Sourced by run.
#
# cache/vmm/linux.uml    Debian's user-mode-linux: a VM that is an ordinary process
# cache/vmm/SERIES-KEY/  KEY stands for what it was made from
#     vmm-root.img       the disk that all of them boot from, with vmm/init.c as its init
#     vmm-state          a VM of the series' kernel in QEMU, saved in its initramfs
#     vmm-machine        how QEMU is to be started for it
#
# Booting a distribution's kernel under an emulator in an emulator takes a minute and more. So the VM is booted once,
# here, and in the guest it is restored over the snapshot, as a microVM is restored from its memory file.

vmm_dir=$cache/vmm

# QEMU's parts, beside the program itself and its libraries.
vmm_qemu_parts="/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so /usr/share/seabios/bios-256k.bin
    /usr/share/qemu/kvmvapic.bin"

# The disk: room for what a VM writes, small enough to be read whole.
readonly vmm_image_mib=24

# The machine, told alike to the QEMU that saves and to those that restore. Without cx16 for the reason that guest.sh has.
vmm_machine="-M q35 -accel tcg -cpu qemu64,cx16=off -m 128 -smp 1 -nodefaults -no-user-config -display none -no-reboot"

# vmm_files SERIES: makes what is missing, and adds all of it to guest_files.
vmm_files() {
    local series=$1 lock state
    [[ $(dpkg --print-architecture) == amd64 ]] || die "the hypervisors' tests are for amd64 only"
    host_packages gcc libc6-dev
    kernel_ensure "$series"
    state=$vmm_dir/$series-$(vmm_key "$series")
    mkdir -p "$vmm_dir"
    exec {lock}>"$vmm_dir/lock"
    flock "$lock"
    if [[ ! -x $vmm_dir/linux.uml || ! -d $state ]]; then
        # Not part of a condition, which would turn errexit off inside.
        (vmm_make "$series" "$state")
    fi
    exec {lock}>&-
    # shellcheck disable=SC2206
    guest_files+=("$vmm_dir/linux.uml" "$state"/vmm-{state,root.img,machine} "$(tool qemu-system-x86_64)" $vmm_qemu_parts)
}

vmm_make() {
    local series=$1 state=$2
    # Under the lock, whatever is here was left by a run that was killed.
    rm -rf "$vmm_dir"/new.*
    find "$vmm_dir" -mindepth 1 -maxdepth 1 -name "$series-*" -mtime +0 -exec rm -rf {} +
    tmp=$(mktemp -d "$vmm_dir/new.XXXXXX")
    trap 'rm -rf "$tmp"' EXIT
    [[ -x $vmm_dir/linux.uml ]] || vmm_fetch_uml
    [[ ! -d $state ]] || return 0
    mkdir "$tmp/new"
    gcc -O2 -static -Wall -o "$tmp/init" "$here/vmm/init.c" -lm
    vmm_image "$tmp/new/vmm-root.img"
    vmm_save "$series"
    echo "$vmm_machine" >"$tmp/new/vmm-machine"
    mv -T "$tmp/new" "$state"
}

# What a saved VM depends on: QEMU and its firmware, the machine, the kernel, the init.
vmm_key() {
    # shellcheck disable=SC2086
    { qemu-system-x86_64 --version && echo "$vmm_machine" && cat "$here/vmm/init.c" "$here/vmm.sh" $vmm_qemu_parts \
        "$cache/kernels/$1/release"; } | sha256sum | cut -c 1-16
}

# Of the package, the program alone is used. Its installation would take root.
vmm_fetch_uml() {
    say "fetching user-mode-linux"
    mkdir "$tmp/uml"
    cd "$tmp/uml"
    apt-get -q -q -o APT::Sandbox::User= download user-mode-linux >&2 || {
        apt_update
        apt-get -q -q -o APT::Sandbox::User= download user-mode-linux >&2
    }
    dpkg-deb --fsys-tarfile user-mode-linux_*.deb | tar -x ./usr/bin/linux.uml
    cd - >/dev/null
    mv "$tmp/uml/usr/bin/linux.uml" "$vmm_dir/linux.uml"
}

# An ext4 file system of blocks of a page, so that a chunk holds whole ones.
vmm_image() {
    local image=$1
    mkdir -p "$tmp/seed"/{proc,dev,etc,data}
    cp "$tmp/init" "$tmp/seed/init"
    # Content that no two blocks of share, made without a clock or a dice.
    seq -f '%015g' 65536 >"$tmp/seed/data/blob"
    truncate -s "${vmm_image_mib}M" "$image"
    PATH=$PATH:/usr/sbin:/sbin mke2fs -q -t ext4 -b 4096 -d "$tmp/seed" "$image"
}

vmm_save() {
    local series=$1 release kernel=$cache/kernels/$1 tree=$tmp/initramfs module qemu tries
    release=$(kernel_release "$series")
    say "saving a VM of kernel $release"
    mkdir -p "$tree/lib" "$tmp/modules"
    (cd "$tmp/modules" && cpio --quiet -i -d -m <"$kernel/modules.cpio")
    cp "$tmp/init" "$tree/init"
    for module in virtio_pci virtio_blk ext4; do
        modprobe -d "$tmp/modules/usr" -S "$release" --show-depends "$module"
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r module; do
        cp "$module" "$tree/lib"
        echo "/lib/${module##*/}"
    done >"$tree/modules"
    cpio_pack "$tree" >"$tmp/initrd"

    # A disk of the size that the restored one has. Memory that is free is zero (init_on_free), and takes no room in the state.
    cp "$tmp/new/vmm-root.img" "$tmp/disk"
    mkfifo "$tmp/monitor"
    exec {monitor}<>"$tmp/monitor"
    # shellcheck disable=SC2086
    timeout --kill-after=5 120 qemu-system-x86_64 $vmm_machine -serial "file:$tmp/serial" -monitor stdio \
        -kernel "$kernel/vmlinuz" -initrd "$tmp/initrd" \
        -append "console=ttyS0 quiet panic=-1 reboot=t acpi=off no_timer_check nokaslr mitigations=off cryptomgr.notests random.trust_cpu=on init_on_free=1" \
        -drive "if=none,id=disk,file=$tmp/disk,format=raw" -device virtio-blk-pci,drive=disk \
        <"$tmp/monitor" >"$tmp/qemu" 2>&1 &
    qemu=$!
    for ((tries = 1200; tries > 0; tries--)); do
        ! grep -aq '^VM waits' "$tmp/serial" 2>/dev/null || break
        kill -0 "$qemu" 2>/dev/null || break
        sleep 0.1
    done
    # A VM that was stopped before would be restored stopped.
    printf 'migrate_set_parameter max-bandwidth 10G\nmigrate "exec:cat >%s"\nquit\n' "$tmp/new/vmm-state" >&"$monitor"
    wait "$qemu" || true
    exec {monitor}>&-
    if ! grep -aq '^VM waits' "$tmp/serial" || grep -a '^VM failed' "$tmp/serial" >&2 || [[ ! -s $tmp/new/vmm-state ]]; then
        tail -n 20 "$tmp/serial" "$tmp/qemu" >&2
        die "cannot save a VM of kernel $release"
    fi
}

# The kernel tests that boot hypervisors, alone.
command_vmm() {
    local variables
    exec_options "$@"
    ((${#guest_command[@]} > 0)) || guest_command=(vmm::)
    host_guest
    host_build
    (cd "$root" && build_cli && build_kernel_tests)
    kernel_ensure "$guest_kernel"
    variables=("DMSNAP_TEST_KERNEL=$(kernel_release "$guest_kernel" | cut -d. -f1,2)")
    ((guest_udev == 0)) || variables+=(DMSNAP_TEST_UDEV=1)
    guest_vmm=1
    guest_files+=("$target_dir/vm/kernel")
    guest_exec env "${variables[@]}" ./kernel --test-threads=1 --show-output "${guest_command[@]}"
}
