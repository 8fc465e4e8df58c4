# Boots a guest, relays what COMMAND prints and takes over its exit status.
# Sourced by run.
#
# Three virtio-serial ports lead out of the guest, each into a file: what
# COMMAND prints, the verdict, and a tar of $DMSNAP_OUT. A file, unlike a pipe,
# always has room, so all that the guest wrote is there when QEMU has ended.
# The serial console carries the kernel's log and nothing of COMMAND's.

readonly status_deadline=124 status_no_verdict=125

# What a kernel says when something is wrong with it.
readonly splat='cut here|WARNING:|BUG:|Oops|Kernel panic|general protection|blocked for more than|locking dependency'

guest_kernel=6.12
guest_udev=0
guest_counted=0
guest_memory=2048
guest_cpus=
guest_timeout=600
guest_out=
guest_console=
guest_times=0
guest_vmm=0
guest_fio=0
guest_files=()

guest_dir=
guest_pids=()

guest_is_arm64() {
    [[ $guest_kernel == arm64 ]]
}

# Runs COMMAND in a guest as the guest_* settings say, and exits.
guest_exec() {
    local status
    kernel_ensure "$guest_kernel"
    guest_is_arm64 || qemu_ensure
    ((guest_vmm == 0)) || vmm_files "$guest_kernel"
    ((guest_fio == 0)) || guest_files+=("$(tool fio)" "$(tool fsverity)")
    guest_dir=$(mktemp -d "${TMPDIR:-/tmp}/dmsnap-vm.XXXXXX")
    trap guest_cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    image_build "$guest_dir/initramfs" "$guest_kernel" "$guest_udev" "$@"
    guest_prepare
    guest_boot
    # A kernel patches itself as it comes up, and QEMU's threads may run the half
    # of it: 7.3.4 was seen to stop at an int3 in sched_clock_cpu, once in some
    # hundred boots. What init has begun is never begun again.
    if guest_is_stillborn; then
        say "the kernel did not come up to init; once more"
        guest_keep
        guest_boot
    fi
    if [[ -n $guest_out ]]; then
        mkdir -p "$guest_out"
        [[ ! -s $guest_dir/out ]] || tar -C "$guest_out" --no-same-owner -xf "$guest_dir/out"
    fi
    guest_verdict
}

guest_cleanup() {
    local pid
    for pid in "${guest_pids[@]}"; do
        kill "$pid" 2>/dev/null || true
    done
    rm -rf "$guest_dir"
}

guest_prepare() {
    ln -s "$cache/kernels/$guest_kernel/vmlinuz" "$guest_dir/vmlinuz"
    truncate -s 4G "$guest_dir/scratch"
    touch "$guest_dir"/{console,output,verdict,out}
}

guest_is_stillborn() {
    ((guest_status != 124 && guest_status != 137)) && ! grep -aq '^init: up' "$guest_dir/console"
}

# Returns when the guest is gone, however it ended.
guest_boot() {
    local qemu relay append cpu clock cpus=2 machine=("$emulator")
    # oops=panic, panic=-1 and -no-reboot: a guest that fails ends at once.
    append="console=ttyS0 panic=-1 oops=panic random.trust_cpu=on no_timer_check"
    # Crypto self-tests and the like are a third of the boot under emulation.
    # init_on_alloc=0: Debian's kernels clear all memory that they hand out, which is a tenth of what a test costs.
    append+=" init_on_alloc=0 mitigations=off cryptomgr.notests initcall_blacklist=init_encrypted,crypto_kdf108_init,jent_mod_init"
    # QEMU 7.2 leaves junk in the flags after cmpxchg16b; an interrupt just then
    # makes the kernel panic in kmem_cache_alloc, once in some hundred boots.
    # Without cx16 the kernel does not use the instruction. la57, a fifth level
    # of page tables, only costs time.
    cpu=max,cx16=off,la57=off
    clock=(-accel tcg,thread=multi)
    # The guest's clock then counts its instructions, a nanosecond each, and not the
    # host's time: nothing else that the host does is in what the guest measures.
    # With erms it would clear and copy memory a byte at a time, each counted.
    if ((guest_counted)); then
        clock=(-accel tcg,thread=single -icount shift=0,sleep=off)
        cpu+=,erms=off,fsrm=off
        # 5.10 and 6.1 then never get past bringing up a second core.
        [[ $guest_kernel != 5.10 && $guest_kernel != 6.1 ]] || cpus=1
    fi
    ! guest_is_arm64 || arm64_machine
    (
        cd "$guest_dir"
        exec timeout --kill-after=5 "$guest_timeout" "${machine[@]}" \
            "${clock[@]}" -cpu "$cpu" -smp "${guest_cpus:-$cpus}" -m "$guest_memory" \
            -nodefaults -no-user-config -display none -no-reboot \
            -kernel vmlinuz -initrd initramfs -append "$append" \
            -serial file:console \
            -device virtio-serial-pci \
            -chardev file,id=output,path=output -device virtserialport,chardev=output,name=output \
            -chardev file,id=verdict,path=verdict -device virtserialport,chardev=verdict,name=verdict \
            -chardev file,id=out,path=out -device virtserialport,chardev=out,name=out \
            -drive if=none,id=scratch,file=scratch,format=raw,cache=unsafe,discard=unmap \
            -device virtio-blk-pci,drive=scratch
    ) </dev/null >"$guest_dir/qemu" 2>&1 &
    qemu=$!
    guest_relay "$qemu" &
    relay=$!
    guest_pids=("$qemu" "$relay")
    # The relay ends after QEMU, or before it when our reader has gone away
    # (| head): then nobody wants the rest, as SIGPIPE would say.
    wait "$relay" || exit 141
    guest_status=0
    wait "$qemu" || guest_status=$?
    guest_pids=()
}

# Prints what COMMAND prints until QEMU is gone.
guest_relay() {
    local tail=(tail -s 0.1 --pid="$1" -c +1 -f "$guest_dir/output") line
    ((guest_times)) || exec "${tail[@]}" 2>/dev/null
    "${tail[@]}" 2>/dev/null | while IFS= read -r line || [[ -n $line ]]; do
        printf '%s %s\n' "${EPOCHREALTIME/[.,]/}" "$line"
    done
}

guest_verdict() {
    local word='' status='' splats
    [[ -z $guest_console ]] || cp "$guest_dir/console" "$guest_console"
    splats=$(grep -a -E "$splat" "$guest_dir/console" || true)
    read -r word status <"$guest_dir/verdict" || true
    if [[ $word == exit ]]; then
        if [[ -n $splats ]]; then
            say "the kernel complained:"$'\n'"$splats"
            guest_keep
        fi
        exit "$status"
    fi
    cat "$guest_dir/qemu" >&2
    say "last lines of the kernel's log:"
    tail -n 40 "$guest_dir/console" | tr -d '\r' >&2
    guest_keep
    if ((guest_status == 124 || guest_status == 137)); then
        say "the guest passed its deadline of $guest_timeout s"
        exit "$status_deadline"
    fi
    say "the guest ended without a verdict"
    exit "$status_no_verdict"
}

guest_keep() {
    local log=$target_dir/vm/console-$guest_kernel-$$.log
    [[ -s $guest_dir/console ]] || return 0
    mkdir -p "${log%/*}"
    cp "$guest_dir/console" "$log"
    say "kernel log: $log"
}
