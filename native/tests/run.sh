#!/usr/bin/env bash
# Every instruction set against the scalar code: with sanitizers on this machine, and for 64-bit Arm under qemu where a
# cross compiler is installed (Debian: g++-aarch64-linux-gnu qemu-user). Build folders: build/native-*.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! command -v "${CXX:-c++}" > /dev/null; then
  echo "native tests: skipped, no C++ compiler"
  exit 0
fi
build() {
  local folder=$1
  shift
  cmake -S native -B "$folder" -DWATERFILL_TESTS=ON "$@" > /dev/null
  cmake --build "$folder" --parallel > /dev/null
  ctest --test-dir "$folder" --verbose | grep -E "equals|differs|only|tests passed|Failed|ERROR" || {
    ctest --test-dir "$folder" --rerun-failed --output-on-failure
    exit 1
  }
}
echo "this machine, address and undefined-behaviour sanitizers"
build build/native-sanitize -DWATERFILL_SANITIZE=ON
if command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null; then
  echo "64-bit Arm, emulated"
  build build/native-arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
    "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu"
else
  echo "64-bit Arm: skipped, no aarch64-linux-gnu-g++ or no qemu-aarch64"
fi
