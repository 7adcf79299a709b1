#!/usr/bin/env bash
# Unpacks what script/bundle.sh wrote, on a machine without network. It needs only bash, coreutils and python3, so it
# can be copied alone. Call it whenever parts have arrived in DIR: each call keeps them in INTO/parts, and the call that
# finds all parts checks their sums, unpacks and installs into INTO, and prints the lines that set up a shell.
#
#   bash unbundle.sh DIR INTO
#
#   PYTHON   the image's interpreter   default: python3
#
# Exit code 0: installed; 3: parts are missing, and their names are printed; 2: an error in one sentence, such as a part
# with wrong bytes. After a kill, run it again. INTO/environment.sh holds the lines that it prints.
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }
sum() { sha256sum < "$1" | cut -d ' ' -f 1; }
same() { [ -f "$2" ] && [ "$(sum "$1")" = "$(sum "$2")" ]; }
keep() {  # keep FROM TO : copy; the file appears under its name complete or not at all
    { cp "$1" "$2.partial" && mv "$2.partial" "$2"; } || fail "$2 cannot be written; check whether its disk is full"
}

if [ $# -ne 2 ]; then echo "usage: bash $0 DIR INTO" >&2; exit 2; fi
[ -d "$1" ] || fail "$1 is not a folder; pass the folder with part-01, part-02 and so on"
mkdir -p "$2/parts" || fail "$2 cannot be written; pass another folder"
dir="$(cd "$1" && pwd)" into="$(cd "$2" && pwd)"
parts="$into/parts" work="$into/.unpacking" python="${PYTHON:-python3}"
content=(BUNDLE_COMMIT model project site)
command -v "$python" > /dev/null || fail "$python was not found; name an interpreter with PYTHON=/path/to/python3"

# The archive's line is the last one: without it the list is incomplete.
archive_sum() {
    if [[ "$(tail -n 1 "$1")" =~ ^([0-9a-f]{64})"  bundle.tar"$ ]]; then echo "${BASH_REMATCH[1]}"; fi
}
if [ -f "$dir/SHA256SUMS" ]; then
    sent="$(archive_sum "$dir/SHA256SUMS")"
    [ -n "$sent" ] || fail "$dir/SHA256SUMS is cut off or was changed on the way (line ends); send it again unchanged"
    if [ -f "$into/UNPACKED" ] && [ "$(cat "$into/UNPACKED")" != "$sent" ]; then
        fail "$into holds another bundle; pass another folder"
    fi
    same "$dir/SHA256SUMS" "$parts/SHA256SUMS" || keep "$dir/SHA256SUMS" "$parts/SHA256SUMS"
fi
if [ -f "$into/UNPACKED" ]; then cat "$into/environment.sh"; exit 0; fi
if [ ! -e "$work" ]; then  # otherwise an interrupted call left these
    for name in "${content[@]}"; do
        [ ! -e "$into/$name" ] || fail "$into/$name already exists and is not replaced; pass another folder"
    done
fi

if [ ! -f "$parts/SHA256SUMS" ]; then
    for path in "$dir"/part-*[0-9]; do
        if [ -f "$path" ] && ! same "$path" "$parts/${path##*/}"; then keep "$path" "$parts/${path##*/}"; fi
    done
    echo "missing: SHA256SUMS, without which no part can be checked"
    exit 3
fi
names=() missing=() corrupt=()
while read -r expected name; do
    [[ "$name" =~ ^part-[0-9]+$ ]] || continue
    names+=("$parts/$name")
    if [ -f "$parts/$name" ] && [ "$(sum "$parts/$name")" = "$expected" ]; then continue; fi
    if [ ! -f "$dir/$name" ]; then
        if [ -f "$parts/$name" ]; then corrupt+=("$name"); else missing+=("$name"); fi
    elif [ ! -r "$dir/$name" ]; then
        fail "$dir/$name cannot be read; check its owner and permissions"
    elif [ "$(sum "$dir/$name")" != "$expected" ]; then
        corrupt+=("$name")
    else
        keep "$dir/$name" "$parts/$name"
    fi
done < "$parts/SHA256SUMS"
if [ ${#missing[@]} -gt 0 ]; then echo "missing: ${missing[*]} (of ${#names[@]} parts)"; fi
if [ ${#corrupt[@]} -gt 0 ]; then fail "SHA256SUMS does not match ${corrupt[*]}; send these parts again"; fi
if [ ${#missing[@]} -gt 0 ]; then exit 3; fi

for name in "${content[@]}"; do rm -rf "${into:?}/$name"; done
rm -rf "$work"
mkdir "$work"
cat "${names[@]}" > "$work/bundle.tar"
expected="$(archive_sum "$parts/SHA256SUMS")"
[ "$(sum "$work/bundle.tar")" = "$expected" ] || fail "the joined parts do not give the archive; send SHA256SUMS again"
for archive in bundle.tar project.tar.xz; do
    "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
        "$work/$archive" "$work" ||
        fail "$archive cannot be unpacked; Python must have lzma, and the disk of $into must have space"
    rm "$work/$archive"
done
# Use the pip in the bundle, because an image may have none; isolated, so that no setting of the image makes it use the
# network.
"$python" "$work/pip.whl/pip" --isolated --disable-pip-version-check install --quiet --no-index --no-deps \
    --no-warn-script-location --root-user-action ignore --target "$work/site" "$work"/wheels/*.whl ||
    fail "the wheels cannot be installed with $("$python" --version); bundle again with this version in --have FILE"
PYTHONPATH="$work/site" "$python" - "$work" << 'CHECK' || fail "the command mtl-lora does not run; see the lines above"
import importlib.metadata, pathlib, subprocess, sys

work = pathlib.Path(sys.argv[1])
sys.path.append(str(work / "pip.whl"))
from pip._vendor.packaging.requirements import Requirement

for requirement in map(Requirement, (work / "image.txt").read_text().split("\n")[:-1]):
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not requirement.specifier.contains(found, prereleases=True):
        has = f"has {found}" if found else "lacks it"
        print(f"warning: the bundle counts on {requirement} in the image, which {has}", file=sys.stderr)
sys.exit(subprocess.run([sys.executable, work / "site" / "bin" / "mtl-lora", "--version"]).returncode)
CHECK
# The recipes call python; make that this interpreter, whatever the image's own python is.
program="$("$python" -c 'import sys; print(sys.executable)')"
for name in python python3; do
    printf '#!/usr/bin/env bash\nexec %q "$@"\n' "$program" > "$work/site/bin/$name"
    chmod +x "$work/site/bin/$name"
done
{
    printf 'export PYTHONPATH=%q${PYTHONPATH:+:$PYTHONPATH}\n' "$into/site"
    printf 'export PATH=%q:$PATH\n' "$into/site/bin"
    printf 'export MTL_LORA_WHEELS=%q MTL_LORA_CACHE=%q\n' "$into/model" "$into/cache"
    printf 'export VENV=  # the recipes use this environment instead of making one\n'
    printf 'cd %q  # the recipes, and the data where the recipes look for them\n' "$into/project"
} > "$into/environment.sh"
for name in "${content[@]}"; do mv "$work/$name" "$into/$name"; done
echo "$expected" > "$work/UNPACKED"
mv "$work/UNPACKED" "$into/UNPACKED"
rm -rf "$work"
cat "$into/environment.sh"
