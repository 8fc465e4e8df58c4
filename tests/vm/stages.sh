# test, demo, bench and soak: what is built, and what of it runs where. Sourced by run.

stage_failures=0
stage_report=()
total_passed=0
total_failed=0
test_fetch=

seconds() {
    printf '%d.%d' "$(($1 / 1000))" "$(($1 % 1000 / 100))"
}

now_ms() {
    local now=${EPOCHREALTIME/[.,]/}
    echo "${now%???}"
}

# stage NAME COMMAND...: runs it, and goes on whatever comes of it; the report
# at the end decides. COMMAND runs with errexit off.
stage() {
    local name=$1 begin verdict=ok
    shift
    printf '\n== %s\n' "$name"
    begin=$(now_ms)
    "$@" || { verdict=FAILED; stage_failures=$((stage_failures + 1)); }
    stage_report+=("$(printf '%-6s %7s s  %s' "$verdict" "$(seconds $(($(now_ms) - begin)))" "$name")")
    [[ $verdict == ok ]]
}

# The features of the crate without the crates that the default is made of.
slim_features() {
    awk '/^\[/ { on = ($0 == "[features]") ; next }
        on && match($0, /^[a-z][a-z0-9_-]*/) { print substr($0, 1, RLENGTH) }' "$root/Cargo.toml" |
        grep -vxE 'default|devicemapper|loopdev' | paste -sd,
}

# build_target KIND NAME CARGO-ARGS...: builds and prints the executable's path.
build_target() {
    build_target_by cargo "$@"
}

# build_target_by CARGO KIND NAME CARGO-ARGS...
build_target_by() {
    local cargo=$1 kind=$2 name=$3 messages path
    shift 3
    messages=$("$cargo" "$@" --locked --message-format=json-render-diagnostics) || return 1
    path=$(grep '"reason":"compiler-artifact"' <<<"$messages" |
        grep -F "\"kind\":[\"$kind\"]" | grep -F "\"name\":\"$name\"" |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
    [[ -x $path ]] || { say "cargo built no $kind $name"; return 1; }
    echo "$path"
}

build_cli() {
    cargo build --release --locked --features cli --bin dmsnap
}

# The binary under a name without cargo's hash, as it is called in the guest.
build_kernel_tests() {
    local path
    path=$(build_target test kernel test --no-run --all-features --test kernel) || return 1
    mkdir -p "$target_dir/vm"
    cp "$path" "$target_dir/vm/kernel"
}

# The same without the crates that the default is made of.
build_slim_kernel_tests() {
    local path
    path=$(build_target test kernel test --no-run --no-default-features --features "$(slim_features)" \
        --test kernel) || return 1
    mkdir -p "$target_dir/vm/slim"
    cp "$path" "$target_dir/vm/slim/kernel"
}

kernel_tests_path() {
    case $1 in
        arm64) echo "$target_dir/vm/arm64/kernel" ;;
        *+slim) echo "$target_dir/vm/slim/kernel" ;;
        *) echo "$target_dir/vm/kernel" ;;
    esac
}

# The fuzz targets' corpus, replayed by plain tests of the fuzz workspace.
fuzz_replay() {
    cargo test --manifest-path fuzz/Cargo.toml --locked
}

command_test() {
    # Those that take longest come first, so that none of them is the last to end. Both builds pass everything: the
    # slim one on one kernel, the default one beside udevd, and on three kernels, which share what is the same on each.
    local kernels="latest 5.10 6.12+udev 6.1 6.12+slim" kernel begin line
    while (($# > 0)); do
        case $1 in
            --kernels) option_value "$@"; kernels=$2; shift 2 ;;
            --whole) test_whole=1; shift ;;
            --jobs) option_value "$@"; test_jobs=$2; shift 2 ;;
            *) usage_error "test: unknown argument $1" ;;
        esac
    done
    [[ -n ${kernels// /} ]] || usage_error "test: --kernels names none"
    guest_fio=1
    for kernel in $kernels; do
        known_kernel "${kernel%%+*}"
        [[ $kernel != *+udev* ]] || guest_udev=1
    done
    begin=$(now_ms)
    host_guest
    host_build
    host_lints
    cd "$root"

    # An empty cache fills up beside the builds. Whatever comes of it, each kernel is asked for again when it is used.
    # shellcheck disable=SC2046,SC2086
    "$here/run" fetch $(printf '%s\n' $kernels | sed 's/+.*$//' | sort -u) &
    test_fetch=$!
    trap 'kill $(jobs -rp) 2>/dev/null || true' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP

    # The guests' first, so that two of them are at work beside the rest of the stages.
    if stage "build the command line" build_cli && stage "build the kernel tests" build_kernel_tests &&
        { [[ $kernels != *+slim* ]] || stage "build the kernel tests, no default features" build_slim_kernel_tests; } &&
        { [[ $kernels != *arm64* ]] || stage "build the kernel tests for arm64" build_arm64_kernel_tests; }; then
        # shellcheck disable=SC2086
        kernel_tests_queue $kernels
    fi
    kernel_tests_fill
    stage "fmt" cargo fmt --all --check || true
    stage "clippy" cargo clippy --all-targets --all-features --locked -- -D warnings || true
    # No part of all targets, as its tests are none of `cargo test`'s.
    stage "clippy, kernel tests" cargo clippy --test kernel --all-features --locked -- -D warnings || true
    stage "check, no default features" cargo check --no-default-features --locked || true
    RUSTDOCFLAGS='-D warnings' stage "doc" cargo doc --no-deps --all-features --locked || true
    stage "test on this machine" cargo test --all-features --locked || true
    stage "test on this machine, no default features" \
        cargo test --no-default-features --features "$(slim_features)" --locked || true
    [[ ! -e fuzz/Cargo.toml ]] || stage "fuzz corpus" fuzz_replay || true
    stage "build for arm64, Rust $(rust_version)" build_arm64 || true
    [[ " $kernels " != *" 5.10 "* || " $kernels " != *" latest "* ]] ||
        stage "layers carried from 5.10 to the newest" carry 5.10 latest || true
    kernel_tests

    printf '\n== report, %s s in all\n' "$(seconds $(($(now_ms) - begin)))"
    for line in "${stage_report[@]}"; do
        printf '%s\n' "$line"
    done
    printf '%d kernel tests passed, %d failed\n' "$total_passed" "$total_failed"
    ((stage_failures == 0)) || die "$stage_failures of the above failed"
}

# Two guests at a time keep two cores busy.
test_jobs=2

declare -A job_spec=() job_part=() job_begin=()

# What is still to be started, as "SPEC PART".
job_queue=()

# Whether every kernel passes everything, and which share of what it does not have to pass alone each SPEC has.
test_whole=0
declare -A test_share=()

# kernel_tests_share SPEC...: those of the default build, without udevd, share.
kernel_tests_share() {
    local spec sharing=()
    for spec in "$@"; do
        [[ $spec == *+* || $spec == arm64 ]] || sharing+=("$spec")
    done
    for spec in "${!sharing[@]}"; do
        test_share[${sharing[spec]}]=$((spec + 1))/${#sharing[@]}
    done
}

# kernel_tests_queue SPEC...: a SPEC is a kernel, with "+udev", "+slim" or both in this order behind it, or neither.
kernel_tests_queue() {
    local spec kernel part ready=()
    wait "$test_fetch" || true
    for spec in "$@"; do
        kernel=${spec%%+*}
        if ! "$here/run" fetch "$kernel"; then
            stage_failures=$((stage_failures + 1))
            stage_report+=("FAILED            kernel $spec: cannot be had")
            continue
        fi
        ready+=("$spec")
    done
    ((test_whole)) || kernel_tests_share "${ready[@]}"
    # In halves, so that no core waits long for another at the end: the longer one comes first.
    for part in rest proof; do
        for spec in "${ready[@]}"; do
            job_queue+=("$spec $part")
        done
    done
}

# Starts guests until as many are at work as may be.
kernel_tests_fill() {
    while ((${#job_queue[@]} > 0 && ${#job_spec[@]} < test_jobs)); do
        # shellcheck disable=SC2086
        kernel_tests_begin ${job_queue[0]}
        job_queue=("${job_queue[@]:1}")
    done
}

# Returns when all of them have ended.
kernel_tests() {
    kernel_tests_fill
    while ((${#job_spec[@]} > 0)); do
        kernel_tests_end
        kernel_tests_fill
    done
}

# kernel_tests_begin SPEC PART: PART is "proof" or "rest".
kernel_tests_begin() {
    local spec=$1 part=$2 kernel=${1%%+*} filter=()
    local options=(--kernel "$kernel" --timeout 2400 --file "$(kernel_tests_path "$spec")")
    [[ $kernel == arm64 ]] || options+=(--vmm --fio)
    local variables=("DMSNAP_TEST_KERNEL=$(kernel_release "$kernel" | cut -d. -f1,2)")
    if [[ $spec == *+udev* ]]; then
        options+=(--udev)
        variables+=(DMSNAP_TEST_UDEV=1)
        # Arguments, what is in COW files, VMs, what the kernel does, and examples of calls that others make beside udevd:
        # it has no part in any of them.
        filter+=(--skip bad_input:: --skip bad_names:: --skip discard:: --skip documented:: --skip facts:: --skip made_cow:: --skip sizes:: --skip stores:: --skip vmm::)
    fi
    [[ -z ${test_share[$spec]:-} ]] || filter+=("--share=${test_share[$spec]}")
    case $part in
        proof) filter+=(proof::) ;;
        rest) filter+=(--skip proof::) ;;
    esac
    "$here/run" exec "${options[@]}" -- env "${variables[@]}" ./kernel --exact side_by_side "${filter[@]}" \
        >"$target_dir/vm/test-$spec-$part.log" 2>&1 &
    job_spec[$!]=$spec
    job_part[$!]=$part
    job_begin[$!]=$(now_ms)
}

# The tests of a log that took longest: each has a line that ends with its time, as in <1.234s>.
slowest_tests() {
    sed -n 's/^test \([^ ]*\) \.\.\. [a-zA-Z]* <\([0-9]*\.[0-9]\)[0-9]*s>$/\2 s \1/p' "$1" | sort -rn | head -n 5
}

# Waits for one guest to end, and prints what it printed.
kernel_tests_end() {
    local pid status=0 spec part log ms verdict=ok passed failed ignored line
    wait -n -p pid "${!job_spec[@]}" || status=$?
    spec=${job_spec[$pid]}
    part=${job_part[$pid]}
    log=$target_dir/vm/test-$spec-$part.log
    ms=$(($(now_ms) - job_begin[$pid]))
    unset "job_spec[$pid]" "job_part[$pid]" "job_begin[$pid]"
    printf '\n== kernel %s, %s\n' "$spec" "$part"
    cat "$log"
    read -r passed failed ignored < <(awk '
        $1 == "test" && $2 == "result:" { passed += $4; failed += $6; ignored += $8 }
        END { print passed + 0, failed + 0, ignored + 0 }' "$log")
    total_passed=$((total_passed + passed))
    total_failed=$((total_failed + failed))
    # A run that tested nothing must not pass for one that tested all.
    if ((status != 0 || passed == 0)); then
        verdict=FAILED
        stage_failures=$((stage_failures + 1))
    fi
    stage_report+=("$(printf '%-6s %7s s  kernel %s (%s), %s: %d passed, %d failed, %d ignored' "$verdict" "$(seconds "$ms")" \
        "$spec" "$(kernel_release "${spec%%+*}")" "$part" "$passed" "$failed" "$ignored")")
    while read -r line; do
        stage_report+=("                     $line")
    done < <(slowest_tests "$log")
}

# carry FROM TO: a stack of layers moves from a guest of one kernel to a guest of another, by copied files alone.
carry() {
    local packed=$target_dir/vm/carry file files=()
    rm -rf "$packed"
    "$here/run" exec --kernel "$1" --file "$here/carry/pack" --out "$packed" -- sh ./pack || return 1
    for file in "$packed"/*; do
        files+=(--file "$file")
    done
    "$here/run" exec --kernel "$2" --file "$here/carry/unpack" "${files[@]}" -- sh ./unpack
}

command_carry() {
    (($# == 2)) || usage_error "carry wants two kernels"
    known_kernel "$1"
    known_kernel "$2"
    host_guest
    host_build
    (cd "$root" && build_cli)
    carry "$1" "$2"
}

command_demo() {
    exec_options "$@"
    ((${#guest_command[@]} == 0)) || usage_error "demo takes no COMMAND"
    host_guest
    host_build
    (cd "$root" && cargo build --release --locked --example demo)
    guest_files+=("$target_dir/release/examples/demo")
    guest_exec ./demo
}

command_bench() {
    local quick=() benches="lifecycle chunk_size" bench path variables=(DMSNAP_BENCH_DISK=/dev/vda)
    while (($# > 0)); do
        case $1 in
            --quick) quick=(--quick); shift ;;
            --only) option_value "$@"; benches=$2; shift 2 ;;
            *) break ;;
        esac
    done
    exec_options "$@"
    for bench in $benches; do
        [[ -e $root/benches/$bench.rs ]] || usage_error "bench: there is no $bench"
    done
    host_guest
    host_build
    (cd "$root" && build_cli)
    mkdir -p "$target_dir/vm"
    for bench in $benches; do
        path=$(cd "$root" && build_target bench "$bench" bench --no-run --all-features --bench "$bench")
        cp "$path" "$target_dir/vm/$bench"
        guest_files+=("$target_dir/vm/$bench")
    done
    guest_out=${guest_out:-$target_dir/vm-bench}
    ((guest_timeout_given)) || guest_timeout=3600
    ((guest_counted == 0)) || variables+=(DMSNAP_BENCH_COUNTED=1)
    # Ended from within, it still hands out what it has.
    # shellcheck disable=SC2016
    guest_exec env "${variables[@]}" timeout "$((guest_timeout > 60 ? guest_timeout - 45 : guest_timeout))" \
        sh -ec 'for bench in $0; do "./$bench" --bench "$@"; done' \
        "$benches" "${quick[@]}" "${guest_command[@]}"
}

# The kernel tests' proof in its long form, which no CI run has the time for.
command_soak() {
    local variables
    guest_memory=4096
    exec_options "$@"
    ((guest_timeout_given)) || guest_timeout=7200
    ((${#guest_command[@]} > 0)) || guest_command=(proof::)
    host_guest
    host_build
    (cd "$root" && build_cli && build_kernel_tests)
    kernel_ensure "$guest_kernel"
    variables=("DMSNAP_TEST_KERNEL=$(kernel_release "$guest_kernel" | cut -d. -f1,2)" DMSNAP_TEST_LONG=1)
    ((guest_udev == 0)) || variables+=(DMSNAP_TEST_UDEV=1)
    [[ -z ${DMSNAP_TEST_SEED:-} ]] || variables+=("DMSNAP_TEST_SEED=$DMSNAP_TEST_SEED")
    guest_files+=("$target_dir/vm/kernel")
    guest_exec env "${variables[@]}" ./kernel --exact side_by_side --show-output "${guest_command[@]}"
}
