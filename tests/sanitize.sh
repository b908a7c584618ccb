#!/usr/bin/env bash
# The C++ tests and the kernels' Python tests under a sanitizer: tests/sanitize.sh address,undefined | thread
#
# A copy of the package with the sanitized libraries goes to build/<sanitizer>/site; Python itself is not
# instrumented, so the sanitizer's runtime is preloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
sanitizer=$1
python=$PWD/.venv/bin/python
build=$PWD/build/${sanitizer//,/-}
site=$build/site

echo "== -fsanitize=$sanitizer: building"
mkdir -p "$site"
cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$python" -DTTS_SANITIZE="$sanitizer" > "$build/log" || { cat "$build/log"; exit 1; }
cmake --build "$build" > "$build/log" || { cat "$build/log"; exit 1; }

echo "== -fsanitize=$sanitizer: C++ tests"
ctest --test-dir "$build" --output-on-failure

echo "== -fsanitize=$sanitizer: the kernels' tests"
rm -rf "$site/tts_kernels" && cp -r tts_kernels "$site/" && rm -f "$site"/tts_kernels/*.so
cmake --install "$build" --component python --prefix "$site" > "$build/log"
files=()
for source in csrc/cpu/*.cpp; do
  test=tests/test_$(basename "$source" .cpp).py
  if [ -f "$test" ]; then files+=("$test"); fi
done
case $sanitizer in
  thread) runtime=libtsan.so threads=2 chosen="thread or append or copy" ;; # where threads share work
  *) runtime=libasan.so threads=1 chosen="not opcheck and not compile" ;;
esac
# libstdc++ beside it: the runtime looks for __cxa_throw when it starts, before Python has loaded any C++.
preload="$(g++ -print-file-name=$runtime) $(g++ -print-file-name=libstdc++.so)"
# Safe paths, and not `python -m pytest`: either would put this folder, with the plain libraries, in front of $site.
run() {
  PYTHONPATH=$site:$PWD/python PYTHONSAFEPATH=1 TTS_SANITIZED=$site LD_PRELOAD=$preload OMP_NUM_THREADS=$threads \
    ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 \
    "$(dirname "$python")/pytest" -n auto --dist worksteal -p no:cacheprovider -o timeout=0 \
    -m "not slow and not gpu" -k "$chosen" "$@"
}
run "${files[@]}"

# AMX tiles are software here (CMakeLists.txt), so that level is tested on processors without them, too. They are slow:
# test_linear_quantized.py and test_tree_attention.py take many minutes at this level, so they are run by hand.
levels=$(PYTHONPATH=$PWD/python "$python" -c "import tts_kernels as tk; i = tk.backend_info(); print(i.cpu_isa, *i.cpu_isas)")
if [ "$sanitizer" != thread ] && [[ $levels != amx* ]] && [[ $levels == *avx512_bf16* ]]; then
  echo "== -fsanitize=$sanitizer: the level amx"
  TTS_KERNELS_CPU_ISA=amx run tests/test_linear.py
fi
