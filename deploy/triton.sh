#!/bin/sh
# Compiles Triton's way to the CUDA driver into the environment at $1, and puts a stand-in for a compiler beside it.
#
# Triton's NVIDIA back end is one file in C, which it has compiled when it starts. An image has no compiler, so it is
# compiled while the image is built: CC=$1/libexec/cc then copies what is ready, and refuses any other source.
# The driver itself comes with the machine; here an empty library has its name.
set -eu

python=$1/bin/python
ready=$1/libexec
backend=$("$python" -c 'import triton.backends.nvidia as nvidia; print(*nvidia.__path__)')
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
if ! grep -q '{"launch"' "$backend/driver.c"; then
  echo "This Triton has each kernel's launch compiled while it runs, by the compiler that an image lacks: take torch 2.13 or newer." >&2
  exit 1
fi
driver=$(mktemp -d)
mkdir -p "$ready"
gcc -shared -x c /dev/null -Wl,-soname,libcuda.so.1 -o "$driver/libcuda.so.1"
gcc -O3 -shared -fPIC -Wno-psabi "$backend/driver.c" -I"$backend/include" -I"$headers" \
  -L"$driver" -Wl,--no-as-needed -l:libcuda.so.1 -o "$ready/driver.so"
rm -r "$driver"
cp "$backend/driver.c" "$ready/driver.c"
cat >"$ready/cc" <<END
#!/bin/sh
if ! cmp -s "\$1" "$ready/driver.c"; then
  echo "This image has no compiler: it has only what Triton compiles when it starts, and \$1 is something else." >&2
  exit 1
fi
while [ "\$1" != -o ]; do shift; done
exec cp "$ready/driver.so" "\$2"
END
chmod 755 "$ready/cc"
