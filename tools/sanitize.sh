#!/usr/bin/env bash
# Builds the C tests and the extension with AddressSanitizer and UndefinedBehaviorSanitizer and runs both suites under them.
# The sanitized extension goes to build/sanitized/llmcoopt, beside a copy of the Python files: the installed one stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
export LLMCOOPT_SANITIZE=address,undefined UBSAN_OPTIONS=print_stacktrace=1

"$python" setup.py --quiet build_ctest
for test in build/ctest-sanitize/test_*; do
    [ -x "$test" ] && { echo "$test"; "$test"; }
done

mkdir -p build/sanitized
cp -r llmcoopt build/sanitized/
rm -f build/sanitized/llmcoopt/_core*.so
"$python" setup.py --quiet build_ext --build-lib build/sanitized
unset LLMCOOPT_SANITIZE
# The folder one stands in comes first on Python's path, and the package in the tree with it, unless the path is safe: here and in the processes
# that tests start.
export PYTHONSAFEPATH=1 PYTHONPATH="$PWD/build/sanitized"
preload="$(${CC:-cc} -print-file-name=libasan.so) $(${CC:-cc} -print-file-name=libubsan.so)"
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 "$python" -c 'import llmcoopt._core as c; assert "/build/sanitized/" in c.__file__, c.__file__'
# Python itself leaks by design, so leaks are looked for by the C tests and by tests/python; verify_asan_link_order: the runtime is preloaded.
ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 LD_PRELOAD="$preload" \
    "$python" -m pytest -p no:cacheprovider -q "${@:-tests}" --ignore tests/c -m "not parity and not slow"
