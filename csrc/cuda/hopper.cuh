// Hopper's own instructions: boxes of a tensor fetched by the copy engine (TMA), barriers that count their bytes, and
// products of a warpgroup that run on (wgmma). Each has its emulation beside it, written from the PTX manual.
#pragma once

#include "cuda/launch.h"
#include "cuda/tiles.cuh"

#ifndef TDE_EMULATED
#include <cuda.h>
#endif

// Where these instructions exist: not even the next architecture has them.
#if defined(TDE_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TDE_HOPPER
#endif

namespace tde::cuda {

constexpr int kWarpgroup = 128;

#ifdef TDE_EMULATED
// What the driver packs into its opaque words.
struct TensorMap {
  const unsigned char* data;
  int64_t element, sizes[3], strides[3], box[3];  // sizes and box in elements, the rest in bytes; innermost first
};
#else
using TensorMap = CUtensorMap;
#endif

// Describes a matrix as rows of heads of columns, of which boxes of `box_rows` rows of 128 bytes of one head are
// fetched; what lies beyond a head or the last row comes as zeros.
Status describe(const Matrix& a, int64_t heads, int box_rows, TensorMap* map);

// In shared memory: one thread announces bytes, and all wait for their arrival.
class Barrier {
 public:
  // By one thread; the others see it after the next barrier of the block.
  __device__ __forceinline__ void init() {
#ifdef TDE_EMULATED
    state_ = {0, 1, 0};
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(this)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  __device__ __forceinline__ void expect(int bytes) {
#ifdef TDE_EMULATED
    state_.missing += bytes;
    --state_.announcements;
    settle();
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
#endif
  }

  // For the first time with parity 0, then with 1, and in turns.
  __device__ __forceinline__ void wait(unsigned parity) {
#ifdef TDE_EMULATED
    simt::wait_until([this, parity] { return state_.phase != parity; });
#else
    uint32_t done;
    do {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n"
          "}"
          : "=r"(done)
          : "r"(shared_address(this)), "r"(parity)
          : "memory");
    } while (!done);
#endif
  }

#ifdef TDE_EMULATED
  void arrived(int bytes) {
    state_.missing -= bytes;
    settle();
  }
#endif

 private:
#ifdef TDE_EMULATED
  void settle() {
    if (state_.announcements == 0 && state_.missing == 0) state_ = {0, 1, static_cast<uint16_t>(state_.phase ^ 1)};
  }
  struct {
    int32_t missing;
    uint16_t announcements, phase;
  } state_;
#else
  uint64_t state_;
#endif
};
static_assert(sizeof(Barrier) == 8);

#ifdef TDE_EMULATED
// The engine permutes chunks of sixteen bytes by their address in shared memory.
inline unsigned permuted(unsigned address) { return address ^ (address >> 7 & 7) << 4; }
#endif

// By one thread: begins to fetch the box at (row, head, col); `full` counts its bytes.
__device__ __forceinline__ void fetch_box(unsigned char* to, const TensorMap& map, Barrier& full, int col, int head,
                                          int row) {
#ifdef TDE_EMULATED
  simt::sometime([=, &full, memory = simt::shared_memory()] {
    const auto place = static_cast<unsigned>(to - memory);
    const int64_t bytes = map.box[0] * map.element;
    for (int64_t r = 0; r < map.box[2]; ++r)
      for (int64_t c = 0; c < map.box[0]; ++c) {
        unsigned char* at = memory + permuted(place + static_cast<unsigned>(r * bytes + c * map.element));
        const bool exists = row + r < map.sizes[2] && head < map.sizes[1] && col + c < map.sizes[0];
        if (exists)
          std::memcpy(at, map.data + (row + r) * map.strides[2] + head * map.strides[1] + (col + c) * map.element,
                      map.element);
        else
          std::memset(at, 0, map.element);
      }
    full.arrived(static_cast<int>(map.box[2] * bytes));
  });
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(shared_address(to)),
      "l"(&map), "r"(col), "r"(head), "r"(row), "r"(shared_address(&full))
      : "memory");
#endif
}

// How wgmma finds an operand: rows of 128 bytes, permuted as chunk_at has it, in groups of eight that follow each
// other. Bits 0-13: the address, 16-29: not read in this layout, 32-45: from group to group, all by sixteen; 62-63: the
// layout.
__device__ __forceinline__ uint64_t describe_tile(const unsigned char* tile) {
#ifdef TDE_EMULATED
  const auto address = static_cast<unsigned>(tile - simt::shared_memory());
#else
  const unsigned address = shared_address(tile);
#endif
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{8 * kTileRowBytes >> 4} << 32 | uint64_t{1} << 62;
}

#ifdef TDE_EMULATED
template <typename T>
float described(uint64_t descriptor, unsigned row, unsigned k) {
  const unsigned start = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
  T element;
  std::memcpy(&element,
              simt::shared_memory() + permuted(start + row / 8 * group + row % 8 * kTileRowBytes + k * sizeof(T)),
              sizeof(T));
  return to_float(element);
}
#endif

// Of a thread: rows lane / 4 and eight more of its warp's sixteen, two neighbouring columns of every eight.
using WarpgroupProduct = float[16][4];

#define TDE_FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define TDE_SIXTEEN(i) TDE_FOUR(i), TDE_FOUR(i + 1), TDE_FOUR(i + 2), TDE_FOUR(i + 3)
#define TDE_ALL TDE_SIXTEEN(0), TDE_SIXTEEN(4), TDE_SIXTEEN(8), TDE_SIXTEEN(12)

// Begins d = a b^T, or d += a b^T if it adds: 64 rows and 128 rows of 32 bytes. d is not to be touched meanwhile.
template <typename T>
__device__ __forceinline__ void multiply_later(WarpgroupProduct& d, uint64_t a, uint64_t b, bool adds) {
  static_assert(sizeof(T) == 2, "float32 would be cut off to tf32");
#ifdef TDE_EMULATED
  simt::products().later([&d, a, b, adds] {
    const unsigned first = threadIdx.x % kWarpgroup / kWarp * 16 + lane() / 4;
    for (unsigned n = 0; n < 16; ++n)
      for (unsigned i = 0; i < 4; ++i) {
        float sum = adds ? d[n][i] : 0;
        for (unsigned k = 0; k < 16; ++k)
          sum += described<T>(a, first + i / 2 * 8, k) * described<T>(b, n * 8 + lane() % 4 * 2 + i % 2, k);
        d[n][i] = sum;
      }
  });
#else
#define TDE_WGMMA(TYPE)                                                                   \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred adds;\n"                                                                \
      "setp.ne.b32 adds, %66, 0;\n"                                                       \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                        \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, adds, 1, 1, 0, 0;\n"                                                     \
      "}"                                                                                 \
      : TDE_ALL                                                                           \
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)))
  if constexpr (std::is_same_v<T, __half>)
    TDE_WGMMA("f16");
  else
    TDE_WGMMA("bf16");
#undef TDE_WGMMA
#endif
}

// Before the first product of a group: what threads wrote to its registers is there.
__device__ __forceinline__ void open_product_group() {
#ifndef TDE_EMULATED
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void close_product_group() {
#ifdef TDE_EMULATED
  simt::products().commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// The group before the last one is done with its tiles.
__device__ __forceinline__ void wait_for_all_products_but_one() {
#ifdef TDE_EMULATED
  simt::products().wait(1);
#else
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
#endif
}

// d may be read from here on, and not before: the compiler takes it for written here.
__device__ __forceinline__ void wait_for_products([[maybe_unused]] WarpgroupProduct& d) {
#ifdef TDE_EMULATED
  simt::products().wait(0);
#else
  asm volatile("wgmma.wait_group.sync.aligned 0;" : TDE_ALL::"memory");
#endif
}

#undef TDE_ALL
#undef TDE_SIXTEEN
#undef TDE_FOUR

}  // namespace tde::cuda
