# Kernels from the Debian archive, unpacked into a cache. Sourced by run.
#
# cache/kernels/SERIES/vmlinuz       the kernel
# cache/kernels/SERIES/modules.cpio  the few modules the guest uses, with their index
# cache/kernels/SERIES/release       what `uname -r` says in it
# cache/kernels/SERIES/wanted        the modules that were asked for
# cache/arm64-tools                  the arm64 guest's user land (arm64.sh)
# cache/rust-VERSION                 the oldest compiler, with arm64's library (arm64.sh)
#
# A series directory is renamed into place when it is complete, so one that
# exists is whole. Delete it to have a newer kernel fetched. One that was made
# with another list of modules is fetched again.

cache=${DMSNAP_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dmsnap-vm}

# Without these no guest starts, or no snapshot can be made in it.
modules_required="loop dm-mod dm-snapshot virtio_pci virtio_blk virtio_console ext4"
# Taken when the kernel has them: fault injection, other file systems.
modules_optional="dm-flakey dm-delay dm-zero dm-log-writes xfs overlay vfat nls_cp437 nls_iso8859-1 nls_ascii nls_utf8 crc32c_generic crc32c_intel"

# The suites that carry a series, as ARCHIVE:SUITE, ARCHIVE being main or security.
kernel_suites() {
    case $1 in
        5.10) echo main:bullseye security:bullseye-security ;;
        6.1) echo main:bookworm security:bookworm-security ;;
        6.12) echo main:bookworm-backports security:bookworm-security ;;
        latest) echo main:trixie-backports ;;
        # 6.12 for the other architecture.
        arm64) kernel_suites 6.12 ;;
        *) die "no such kernel: $1 (known: 5.10, 6.1, 6.12, latest, arm64)" ;;
    esac
}

# The package names that count as that series.
kernel_pattern() {
    case $1 in
        latest) echo '^linux-image-[0-9]+\.[0-9]+\.[^-]*(-[0-9]+)?-cloud-amd64$' ;;
        arm64) echo '^linux-image-6\.12\.[^-]*(-[0-9]+)?-cloud-arm64$' ;;
        *) echo "^linux-image-${1//./\\.}\\.[^-]*(-[0-9]+)?-cloud-amd64\$" ;;
    esac
}

# Makes sure that cache/kernels/SERIES is there.
kernel_ensure() {
    local series=$1
    cache_ensure "kernels/$series" kernel_fetch "$series"
    [[ $series != arm64 ]] || cache_ensure arm64-tools arm64_tools_fetch
}

# cache_ensure DIR COMMAND...: COMMAND makes it, if it is not there, or was made for other wishes.
cache_ensure() {
    local dir=$1 lock
    shift
    mkdir -p "$cache/kernels"
    exec {lock}>"$cache/lock"
    flock "$lock"
    if [[ ! -d $cache/$dir || ( $dir == kernels/* && $(cat "$cache/$dir/wanted" 2>/dev/null) != "$modules_required $modules_optional" ) ]]; then
        # Under the lock, whatever is here was left by a run that was killed.
        rm -rf "$cache"/fetch.*
        # Not part of a condition, which would turn errexit off inside.
        ("$@")
    fi
    exec {lock}>&-
}

kernel_architecture() {
    if [[ $1 == arm64 ]]; then echo arm64; else echo amd64; fi
}

# A directory $tmp in the cache, until the (sub)shell ends.
cache_scratch() {
    what=$1
    tmp=$(mktemp -d "$cache/fetch.XXXXXX")
    trap 'status=$?; rm -rf "$tmp"; ((status == 0)) || say "$what cannot be had"' EXIT
}

kernel_release() {
    cat "$cache/kernels/$1/release"
}

kernel_fetch() {
    local series=$1 image release modules deb
    say "fetching kernel $series"
    [[ $(dpkg --print-architecture) == amd64 ]] || die "guests run on amd64 only"
    cache_scratch "kernel $series"

    apt_open "$tmp/apt" "$(kernel_suites "$series")" "$(kernel_architecture "$series")"
    image=$(apt_private apt-cache pkgnames linux-image- | grep -E "$(kernel_pattern "$series")" | sort -V | tail -n 1) ||
        die "no cloud kernel of series $series in: $(kernel_suites "$series")"
    release=${image#linux-image-}
    say "package $image"

    # Since 7.x the image package is empty and depends on three that are not.
    mkdir "$tmp/debs" "$tmp/root" "$tmp/tree" "$tmp/new"
    # shellcheck disable=SC2046
    (cd "$tmp/debs" && apt_private apt-get -q -q download "$image" $(apt_private apt-cache depends "$image" |
        sed -n "s/^ *Depends: \(linux-[a-z]*-$release\)\$/\1/p")) >&2
    for deb in "$tmp"/debs/*.deb; do
        dpkg-deb -x "$deb" "$tmp/root"
    done
    find "$tmp/root" -type f -name 'vmlinuz*' -exec cp {} "$tmp/new/vmlinuz" \;
    [[ -s $tmp/new/vmlinuz ]] || die "$image holds no kernel"
    modules=$(find "$tmp/root" -type d -path "*lib/modules/$release")
    [[ -d $modules ]] || die "$image holds no modules"

    mkdir -p "$tmp/all/lib/modules"
    mv "$modules" "$tmp/all/lib/modules/$release"
    depmod -b "$tmp/all" "$release"
    modules_pick "$tmp/all" "$tmp/tree" "$release"
    cpio_pack "$tmp/tree" >"$tmp/new/modules.cpio"
    echo "$release" >"$tmp/new/release"
    echo "$modules_required $modules_optional" >"$tmp/new/wanted"
    rm -rf "$cache/kernels/${series:?}"
    mv -T "$tmp/new" "$cache/kernels/$series"
    say "kernel $series is $release"
}

# Copies the wanted modules and what they need from one tree to another,
# uncompressed, and writes their index.
modules_pick() {
    local from=$1 to=$2/usr release=$3 name file list dest
    dest=$to/lib/modules/$release
    mkdir -p "$dest"
    cp "$from/lib/modules/$release"/modules.{order,builtin}* "$dest"
    list=$(for name in $modules_required; do
        modprobe -d "$from" -S "$release" --show-depends "$name" || die "kernel $release lacks module $name"
    done
    for name in $modules_optional; do
        modprobe -d "$from" -S "$release" --show-depends "$name" 2>/dev/null || true
    done)
    sed -n 's/^insmod \([^ ]*\).*/\1/p' <<<"$list" | sort -u | while read -r file; do
        name=${file#"$from"}
        mkdir -p "$to${name%/*}"
        case $name in
            *.xz) xz -dc "$file" >"$to${name%.xz}" ;;
            *.zst) zstd -q -dc "$file" >"$to${name%.zst}" ;;
            *) cp "$file" "$to$name" ;;
        esac
    done
    depmod -b "$to" "$release"
}

# The machine's own apt lines for a Debian archive, one URI a line. apt itself
# reads the sources, whichever format they are in.
apt_uris() {
    local archive=$1 codename
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-stable}")
    # shellcheck disable=SC2016
    apt-get indextargets --no-release-info --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk -v archive="$archive" -v codename="$codename" '
            $1 ~ /^cdrom:/ || $3 != "main" || seen[$1]++ { next }
            archive == "security" && $2 ~ /(-security|\/updates)$/ { print $1 }
            archive == "main" && ($2 == codename || $2 ~ /^(oldstable|stable|testing|unstable|sid)$/) { print $1 }'
}

# apt_open DIR SUITES ARCHITECTURE...: prepares a private apt tree for those
# suites, the first architecture its own. Nothing of the machine's apt state is
# read or changed but its sources, its access settings (Acquire, auth.conf) and
# Debian's keyring, against which all is checked.
apt_open() {
    local dir=$1 suites=$2 main security
    shift 2
    local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    mkdir -p "$dir/state/lists/partial" "$dir/cache/archives/partial"
    apt_conf=$dir/apt.conf
    {
        apt-config dump | grep '^Acquire::' | grep -v '^Acquire::IndexTargets'
        cat <<CONF
Acquire::Languages "none";
APT::Architecture "$1";
APT::Architectures {$(printf ' "%s";' "$@") };
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
Dir::Etc::Main "/dev/null";
Dir::Etc::Parts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::Etc::SourceList "$dir/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State "$dir/state";
Dir::State::Status "/dev/null";
Dir::Cache "$dir/cache";
Dir::Log "$dir";
CONF
    } >"$apt_conf"

    security=$(apt_uris security | head -n 1)
    # A third party may use Debian's suite names too. Only Debian's archive
    # has these suites signed by Debian, so the first that passes is it.
    for main in $(apt_uris main); do
        local spec suite uri options
        for spec in $suites; do
            suite=${spec#*:}
            uri=$main
            [[ $spec == main:* ]] || uri=$security
            [[ -n $uri ]] || continue
            options="signed-by=$keyring"
            # An archived suite's signature is no longer renewed.
            [[ $suite != bullseye* ]] || options+=" check-valid-until=no"
            echo "deb [$options] $uri $suite main"
        done >"$dir/sources.list"
        if apt_private apt-get -q -q update >"$dir/log" 2>&1; then
            return 0
        fi
        cat "$dir/log" >&2
    done
    die "no apt source of this machine serves $(sed 's/[a-z]*://g' <<<"$suites"), signed by Debian"
}

apt_private() {
    APT_CONFIG=$apt_conf "$@"
}

# apt_unpack ROOT PACKAGE...: those packages and what they depend on, unpacked
# into a tree whose /bin, /sbin and /lib lead into /usr, as a system's do.
apt_unpack() {
    local root=$1 dir deb
    shift
    mkdir -p "$root"/usr/{bin,sbin,lib}
    for dir in bin sbin lib; do
        ln -s "usr/$dir" "$root/$dir"
    done
    apt_private apt-get -q -q -y --no-install-recommends --download-only install "$@" >&2
    for deb in "${apt_conf%/*}"/cache/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -C "$root" --keep-directory-symlink --no-same-owner -xf -
    done
}
