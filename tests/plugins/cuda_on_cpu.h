// What CUDA has built in, as far as kernels.cu uses it, for a C++ compiler. cuda_on_cpu.cpp stands behind it.

#pragma once

#include <math.h>

#define SVCLI_SHIM
#define __device__
#define __global__
#define __launch_bounds__(...)
#define threadIdx (shim::current->thread)
#define blockIdx (shim::current->block)
#define gridDim (shim::grid)
#define SVCLI_SHARED(Type, name)                          \
  static_assert(sizeof(Type) <= shim::kSharedBytes, "");  \
  Type& name = *reinterpret_cast<Type*>(shim::current->shared + shim::kSharedBytes - sizeof(Type))

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

namespace shim {

constexpr int kLanes = 32;
constexpr unsigned long kSharedBytes = 48 * 1024;  // what a kernel gets without asking for more

struct Dim {
  unsigned x;
};

// What a thread knows of itself.
struct Thread {
  Dim thread, block;
  char* shared;  // of its block; ends at a page that cannot be touched
};

extern Thread* current;
extern Dim grid;

float exchange(float value, int offset);  // the value of lane ^ offset
void block_sync();

// A kernel behind the parameters of cuLaunchKernel.
struct Entry {
  const char* name;
  void (*body)(void** parameters);
  unsigned threads;
};

// Those of the compiled source; the last has no name.
extern const Entry entries[];

}  // namespace shim

inline void __syncthreads() { shim::block_sync(); }
inline float __shfl_xor_sync(unsigned, float value, int offset) { return shim::exchange(value, offset); }

template <typename To, typename From>
inline To shim_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
inline float __uint_as_float(unsigned bits) { return shim_bits<float>(bits); }
inline float __int_as_float(int bits) { return shim_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return shim_bits<unsigned>(value); }

inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
float half_to_float(unsigned short bits);
unsigned short float_to_half(float value);
