// TokenGather and SummaryPool. One of SVCLI_FP32, SVCLI_FP16 and SVCLI_BF16 says what elements are, and
// SVCLI_TOKEN_GATHER or SVCLI_SUMMARY_POOL which kernel is wanted: a plan holds one copy of its code for each layer.
//
// Parameters stand in TensorRT's order: inputs, extra arguments, outputs. launch.py knows them by name, works out the
// dimensions, and defines SVCLI_GATHER_* and SVCLI_POOL_*. Nothing is included, so that NVRTC needs no headers, and a
// C++ compiler takes the same file behind a shim that supplies what CUDA has built in (SVCLI_SHIM).
//
// Shapes: B batch, H heads, N rows, M rows taken, D elements of a row.

#define SVCLI_JOIN(name, suffix) name##suffix
#if defined(SVCLI_FP32)
#define SVCLI_ENTRY(name) SVCLI_JOIN(name, _fp32)
using Element = float;
#elif defined(SVCLI_FP16)
#define SVCLI_ENTRY(name) SVCLI_JOIN(name, _fp16)
using Element = unsigned short;  // the bits
#elif defined(SVCLI_BF16)
#define SVCLI_ENTRY(name) SVCLI_JOIN(name, _bf16)
using Element = unsigned short;  // the bits
#endif

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kAccessBytes = 16;

#ifndef SVCLI_SHIM
#define SVCLI_SHARED(Type, name) __shared__ Type name

__device__ inline float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ inline unsigned short float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

__device__ inline float to_float(Element element) {
#if defined(SVCLI_FP32)
  return element;
#elif defined(SVCLI_FP16)
  return half_to_float(element);
#else
  return __uint_as_float(static_cast<unsigned>(element) << 16);
#endif
}

__device__ inline Element from_float(float value) {
#if defined(SVCLI_FP32)
  return value;
#elif defined(SVCLI_FP16)
  return float_to_half(value);
#else
  // By hand, because sm_75 has no such instruction: to nearest, ties to even, and a NaN stays one.
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Element>((bits >> 16) | 0x40u);
  return static_cast<Element>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

__device__ inline unsigned long long address_of(const void* pointer) {
  return reinterpret_cast<unsigned long long>(pointer);
}

#ifdef SVCLI_TOKEN_GATHER

constexpr int kGatherThreads = SVCLI_GATHER_THREADS;
constexpr int kGatherUnroll = SVCLI_GATHER_UNROLL;

// Copies rows in units of `Unit`. A thread has kGatherUnroll loads in flight before it stores the first.
template <typename Unit>
__device__ void gather_rows(const void* data, const long long* index, unsigned groups, unsigned heads, int num_rows,
                            unsigned num_taken, int width, void* rows) {
  constexpr unsigned kChunk = kGatherThreads * kGatherUnroll;
  const auto* from = static_cast<const Unit*>(data);
  auto* to = static_cast<Unit*>(rows);
  const unsigned units = static_cast<unsigned>(width * sizeof(Element) / sizeof(Unit));
  const unsigned total_rows = groups * num_taken;
  const unsigned long long total = static_cast<unsigned long long>(total_rows) * units;
  const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * kChunk;
  for (unsigned long long start = static_cast<unsigned long long>(blockIdx.x) * kChunk; start < total; start += step) {
    // One wide division for the block; those of each unit are in 32 bits.
    const unsigned first_row = static_cast<unsigned>(start / units);
    const unsigned first_unit = static_cast<unsigned>(start % units);
    Unit values[kGatherUnroll];
#pragma unroll
    for (int k = 0; k < kGatherUnroll; ++k) {
      const unsigned unit = first_unit + threadIdx.x + k * kGatherThreads;
      const unsigned row = first_row + unit / units;
      values[k] = Unit{};
      if (row < total_rows) {
        const unsigned group = row / num_taken;
        const unsigned batch = heads == 1 ? group : group / heads;
        long long picked = index[static_cast<unsigned long long>(batch) * num_taken + (row - group * num_taken)];
        if (picked < 0) picked += num_rows;
        // Whoever points outside gets zeros: nothing is read there.
        if (picked >= 0 && picked < num_rows) {
          values[k] = from[(static_cast<long long>(group) * num_rows + picked) * units + unit % units];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kGatherUnroll; ++k) {
      const unsigned long long place = start + threadIdx.x + k * kGatherThreads;
      if (place < total) to[place] = values[k];
    }
  }
}

// rows [B, H, M, D] of data [B, H, N, D] by index [B, M]; groups = B * H.
extern "C" __global__ void __launch_bounds__(kGatherThreads)
    SVCLI_ENTRY(token_gather)(const Element* __restrict__ data, const long long* __restrict__ index, int groups,
                              int heads, int num_rows, int num_taken, int width, Element* __restrict__ rows) {
  const unsigned long long shared_alignment =
      address_of(data) | address_of(rows) | static_cast<unsigned long long>(width * sizeof(Element));
  if (shared_alignment % kAccessBytes == 0) {
    gather_rows<uint4>(data, index, groups, heads, num_rows, num_taken, width, rows);
  } else if (shared_alignment % 8 == 0) {
    gather_rows<uint2>(data, index, groups, heads, num_rows, num_taken, width, rows);
  } else if (shared_alignment % 4 == 0) {
    gather_rows<unsigned>(data, index, groups, heads, num_rows, num_taken, width, rows);
  } else {
    gather_rows<unsigned short>(data, index, groups, heads, num_rows, num_taken, width, rows);
  }
}

#endif  // SVCLI_TOKEN_GATHER

#ifdef SVCLI_SUMMARY_POOL

// An image is pooled by kPoolBlocks blocks (a cluster where there is more than one). Teams of warps take its rows, a
// few at a time. A row lies in the registers of its team, so that it is read once: mean, then variance and score from
// the registers, then its part in the running softmax: greatest score, sum of weights, weighted sum of rows. At the
// end the states of teams are merged, then those of blocks.

constexpr int kPoolThreads = SVCLI_POOL_THREADS;
constexpr int kPoolBlocks = SVCLI_POOL_BLOCKS;
constexpr int kPoolWarps = kPoolThreads / kWarpSize;
constexpr int kPerThread = SVCLI_POOL_PER_THREAD;            // elements of a row that a thread holds
constexpr int kVector = kAccessBytes / sizeof(Element);      // elements of one access
constexpr int kMaxWidth = kPoolThreads * kPerThread;

// Rows that a team takes at once; with more, registers spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kRowsAtOnce = 1;
#else
constexpr int kRowsAtOnce = 4 / sizeof(Element);
#endif

struct PoolShared {
  float partial[2][kPoolWarps * 2 * kRowsAtOnce];
  float team_max[kPoolWarps];
  float team_total[kPoolWarps];
  float block_max;
  float block_total;
  float sum[kMaxWidth];
};

struct alignas(kAccessBytes) Tile {
  Element values[kRowsAtOnce][kPerThread];
};

__device__ inline float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

// What a state with maximum `old_max` has to be scaled by where the maximum is `new_max`. An empty state weighs nothing.
__device__ inline float shrink(float old_max, float new_max) {
  return old_max == minus_infinity() ? 0.0f : expf(old_max - new_max);
}

__device__ inline void cluster_sync() {
#if defined(SVCLI_SHIM)
  shim_cluster_sync();
#elif SVCLI_POOL_BLOCKS > 1
  asm volatile("barrier.cluster.arrive.aligned;\n barrier.cluster.wait.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// What stands at `mine` in the shared memory of block `rank` of the cluster.
__device__ inline float of_block(const float* mine, int rank) {
#if defined(SVCLI_SHIM)
  return *shim_of_block(mine, rank);
#elif SVCLI_POOL_BLOCKS > 1
  float value;
  asm volatile(
      "{\n .reg .u32 there;\n mapa.shared::cluster.u32 there, %1, %2;\n ld.shared::cluster.f32 %0, [there];\n}"
      : "=f"(value)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(mine))), "r"(rank)
      : "memory");
  return value;
#else
  return *mine;
#endif
}

// Each value becomes its sum over the threads of the team. `partial` must not be that of the call before.
template <int kTeamWarps, int kCount>
__device__ inline void team_sum(float (&values)[kCount], float* partial) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(kWholeWarp, values[i], offset);
  }
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) partial[warp * kCount + i] = values[i];
  }
  __syncthreads();
  const int first = warp / kTeamWarps * kTeamWarps;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0.0f;
    for (int each = first; each < first + kTeamWarps; ++each) values[i] += partial[each * kCount + i];
  }
}

template <int kTeamWarps>
__device__ void pool_image(const Element* tokens, const Element* norm_weight, const Element* score_weight,
                           int num_rows, int width, float epsilon, Element* summary, PoolShared& shared) {
  constexpr int kTeamThreads = kTeamWarps * kWarpSize;
  constexpr int kTeams = kPoolWarps / kTeamWarps;
  constexpr int kRowsPerRound = kTeams * kRowsAtOnce;
  const int team = threadIdx.x / kTeamThreads;
  const int member = threadIdx.x % kTeamThreads;
  const int rank = blockIdx.x % kPoolBlocks;
  const bool wide = (address_of(tokens) | static_cast<unsigned long long>(width * sizeof(Element))) % kAccessBytes == 0;

  // Element i of a thread's share stands in this column of the row: whole accesses, neighbours side by side.
  const auto column = [member](int i) { return (i / kVector * kTeamThreads + member) * kVector + i % kVector; };

  const auto load = [&](Tile& tile, int round) {
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int row = (round * kPoolBlocks + rank) * kRowsPerRound + team * kRowsAtOnce + r;
      const Element* from = tokens + static_cast<long long>(row) * width;
#pragma unroll
      for (int i = 0; i < kPerThread; i += kVector) {
        auto& access = *reinterpret_cast<uint4*>(&tile.values[r][i]);
        access = uint4{};
        if (row >= num_rows) continue;
        if (wide) {
          if (column(i) < width) access = *reinterpret_cast<const uint4*>(from + column(i));
        } else {
#pragma unroll
          for (int j = i; j < i + kVector; ++j) {
            if (column(j) < width) tile.values[r][j] = from[column(j)];
          }
        }
      }
    }
  };

  // norm_bias and score_bias move the scores of all rows alike, and a softmax does not see that.
  float score_scale[kPerThread];
  float weighted[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    weighted[i] = 0.0f;
    score_scale[i] =
        column(i) < width ? to_float(norm_weight[column(i)]) * to_float(score_weight[column(i)]) : 0.0f;
  }

  float greatest = minus_infinity();
  float total = 0.0f;
  const int rows_of_round = kPoolBlocks * kRowsPerRound;
  const int rounds = num_rows / rows_of_round + (num_rows % rows_of_round != 0);
  Tile next;
  load(next, 0);
  // Every thread takes part in every round, with or without a row: team_sum has a barrier.
  for (int round = 0; round < rounds; ++round) {
    const Tile tile = next;
    if (round + 1 < rounds) load(next, round + 1);

    float mean[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      mean[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) mean[r] += to_float(tile.values[r][i]);
    }
    team_sum<kTeamWarps>(mean, shared.partial[0]);

    float spread[2 * kRowsAtOnce];  // of each row: squares, then products with the score's weights
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      mean[r] /= width;
      spread[2 * r] = spread[2 * r + 1] = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const float centred = column(i) < width ? to_float(tile.values[r][i]) - mean[r] : 0.0f;
        spread[2 * r] += centred * centred;
        spread[2 * r + 1] += centred * score_scale[i];
      }
    }
    team_sum<kTeamWarps>(spread, shared.partial[1]);

    float score[kRowsAtOnce];
    float new_greatest = greatest;
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int row = (round * kPoolBlocks + rank) * kRowsPerRound + team * kRowsAtOnce + r;
      score[r] = minus_infinity();
      if (row < num_rows) score[r] = spread[2 * r + 1] * rsqrtf(spread[2 * r] / width + epsilon);
      new_greatest = fmaxf(new_greatest, score[r]);
    }
    const float rescale = shrink(greatest, new_greatest);
    greatest = new_greatest;
    total *= rescale;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) weighted[i] *= rescale;
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const float weight = shrink(score[r], greatest);
      total += weight;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) weighted[i] += weight * to_float(tile.values[r][i]);
    }
  }

  if (member == 0) {
    shared.team_max[team] = greatest;
    shared.team_total[team] = total;
  }
  __syncthreads();
  float block_max = minus_infinity();
  float block_total = 0.0f;
  for (int each = 0; each < kTeams; ++each) block_max = fmaxf(block_max, shared.team_max[each]);
  for (int each = 0; each < kTeams; ++each) {
    block_total += shared.team_total[each] * shrink(shared.team_max[each], block_max);
  }
  // One team after the other, so that the order of the additions is always the same.
  for (int each = 0; each < kTeams; ++each) {
    if (team == each) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (column(i) >= width) continue;
        const float before = each == 0 ? 0.0f : shared.sum[column(i)];
        shared.sum[column(i)] = before + weighted[i] * shrink(greatest, block_max);
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    shared.block_max = block_max;
    shared.block_total = block_total;
  }
  cluster_sync();

  float image_max = minus_infinity();
  float image_total = 0.0f;
  for (int each = 0; each < kPoolBlocks; ++each) image_max = fmaxf(image_max, of_block(&shared.block_max, each));
  for (int each = 0; each < kPoolBlocks; ++each) {
    image_total += of_block(&shared.block_total, each) * shrink(of_block(&shared.block_max, each), image_max);
  }
  for (int at = rank * kPoolThreads + threadIdx.x; at < width; at += kPoolBlocks * kPoolThreads) {
    float value = 0.0f;
    for (int each = 0; each < kPoolBlocks; ++each) {
      value += of_block(&shared.sum[at], each) * shrink(of_block(&shared.block_max, each), image_max);
    }
    summary[at] = from_float(image_total == 0.0f ? 0.0f : value / image_total);  // no rows: zeros
  }
  cluster_sync();  // no block leaves while others read its shared memory
}

// summary [B, 1, D] of tokens [B, N, D].
extern "C" __global__ void
#if SVCLI_POOL_BLOCKS > 1
    __cluster_dims__(kPoolBlocks, 1, 1)
#endif
    __launch_bounds__(kPoolThreads, 1)
        SVCLI_ENTRY(summary_pool)(const Element* __restrict__ tokens, const Element* __restrict__ norm_weight,
                                  const Element* __restrict__ /*norm_bias*/, const Element* __restrict__ score_weight,
                                  const Element* __restrict__ /*score_bias*/, int num_images, int num_rows, int width,
                                  int epsilon_bits, Element* __restrict__ summary) {
  SVCLI_SHARED(PoolShared, shared);
  const int image = blockIdx.x / kPoolBlocks;
  if (image >= num_images || width > kMaxWidth) return;
  const Element* from = tokens + static_cast<long long>(image) * num_rows * width;
  Element* to = summary + static_cast<long long>(image) * width;
  const float epsilon = __int_as_float(epsilon_bits);
  if (width <= 2 * kWarpSize * kPerThread) {
    pool_image<2>(from, norm_weight, score_weight, num_rows, width, epsilon, to, shared);
  } else if (width <= 8 * kWarpSize * kPerThread) {
    pool_image<8>(from, norm_weight, score_weight, num_rows, width, epsilon, to, shared);
  } else {
    pool_image<16>(from, norm_weight, score_weight, num_rows, width, epsilon, to, shared);
  }
}

#endif  // SVCLI_SUMMARY_POOL
