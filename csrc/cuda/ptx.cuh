// The instructions that CUDA C++ has no words for: copies that run on, and products on tensor cores. Each has its
// emulation beside it, written from the PTX manual's tables of who holds what.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/elements.cuh"

namespace tde::cuda {

#ifndef TDE_EMULATED
__device__ __forceinline__ unsigned shared_address(const void* place) {
  return static_cast<unsigned>(__cvta_generic_to_shared(place));
}
#endif

// Sixteen bytes from global to shared memory, or as many zeros; there once its group has been waited for.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists) {
#ifdef TDE_EMULATED
  static const unsigned char zeros[kAccess] = {};
  simt::copies().later([to, from = exists ? from : zeros] { std::memcpy(to, from, kAccess); });
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(exists ? kAccess : 0)
               : "memory");
#endif
}

__device__ __forceinline__ void close_copy_group() {
#ifdef TDE_EMULATED
  simt::copies().commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until no more than `kLeft` of the thread's groups are on their way.
template <int kLeft>
__device__ __forceinline__ void wait_for_copy_groups() {
#ifdef TDE_EMULATED
  simt::copies().wait(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// Four matrices of 8 rows of sixteen bytes: lane i names row i % 8 of matrix i / 8 and receives word i % 4 of row i / 4
// of each.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
#ifdef TDE_EMULATED
  const void* const* rows = simt::gather(row);
  for (unsigned m = 0; m < 4; ++m)
    std::memcpy(&to[m], static_cast<const char*>(rows[8 * m + lane() / 4]) + lane() % 4 * 4, 4);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
#endif
}

#ifdef TDE_EMULATED
// Element (row, k) of a, or (k, column) of b transposed, from the registers of the lanes that hold it.
template <typename T>
float held(const uint32_t* of_lane, int row, int k, int registers_a_row) {
  constexpr int kWide = 4 / sizeof(T);  // elements of a register
  const int reg = row / 8 + k / (4 * kWide) * registers_a_row;
  T element;
  std::memcpy(&element, reinterpret_cast<const char*>(of_lane + reg) + k % kWide * sizeof(T), sizeof(T));
  return to_float(element);
}
#endif

// d += a b on tensor cores: a is 16 rows of 32 bytes, b 8 columns of 32 bytes; float32 is multiplied as tf32.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef TDE_EMULATED
  struct Registers {
    uint32_t a[4], b[2];
  };
  Registers mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const Registers* all = simt::gather(mine);
  constexpr int kWide = 4 / sizeof(T), kDepth = 8 * kWide;
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, col = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < kDepth; ++k) {
      const int holder = k / kWide % 4;
      d[i] += held<T>(all[row % 8 * 4 + holder].a, row, k, 2) * held<T>(all[col * 4 + holder].b, 0, k, 1);
    }
  }
#else
  if constexpr (sizeof(T) == 4)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// float32 registers rounded to tf32, half away from zero; what tensor cores are handed unrounded they cut off.
template <typename T, int N>
__device__ __forceinline__ void round_operand(uint32_t (&registers)[N]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
#ifdef TDE_EMULATED
      if ((registers[i] & 0x7fffffffu) <= 0x7f800000u) registers[i] = (registers[i] + 0x1000u) & ~0x1fffu;  // no NaN
#else
      asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(registers[i]) : "f"(__uint_as_float(registers[i])));
#endif
    }
  }
}

}  // namespace tde::cuda
