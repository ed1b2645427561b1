// TokenGather, and SummaryPool in two kernels. One of SVCLI_FP32, SVCLI_FP16 and SVCLI_BF16 says what elements are, and
// SVCLI_TOKEN_GATHER, SVCLI_SUMMARY_PARTIAL or SVCLI_SUMMARY_MERGE which kernel is wanted: a plan holds one copy of its
// code for each layer.
//
// Parameters stand in TensorRT's order: inputs, extra arguments, outputs. launch.py knows them by name, works out the
// dimensions, and defines SVCLI_GATHER_*, SVCLI_PARTIAL_* and SVCLI_MERGE_*. Nothing is included, so that NVRTC needs no
// headers, and a C++ compiler takes the same file behind a shim that supplies what CUDA has built in (SVCLI_SHIM).
//
// Shapes: B batch, H heads, N rows, M rows taken, D elements of a row, S parts of a group of rows.

#define SVCLI_JOIN(name, suffix) name##suffix
#if defined(SVCLI_FP32)
#define SVCLI_ENTRY(name) SVCLI_JOIN(name, _fp32)
using Element = float;
using Pair = uint2;
#elif defined(SVCLI_FP16)
#define SVCLI_ENTRY(name) SVCLI_JOIN(name, _fp16)
using Element = unsigned short;  // the bits
using Pair = unsigned;
#elif defined(SVCLI_BF16)
#define SVCLI_ENTRY(name) SVCLI_JOIN(name, _bf16)
using Element = unsigned short;  // the bits
using Pair = unsigned;
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

// Copies rows in units of `Unit`. A thread reads all its indices, then all its units, before it stores the first: nothing
// stands between loads of one kind, so that they are in flight together.
template <typename Unit>
__device__ void gather_rows(const void* data, const long long* index, unsigned groups, unsigned heads, int num_rows,
                            unsigned num_taken, int width, void* rows) {
  constexpr unsigned kChunk = kGatherThreads * kGatherUnroll;
  const auto* from = static_cast<const Unit*>(data);
  auto* to = static_cast<Unit*>(rows);
  const unsigned units = static_cast<unsigned>(width * sizeof(Element) / sizeof(Unit));
  const unsigned total_rows = groups * num_taken;
  const unsigned long long total = static_cast<unsigned long long>(total_rows) * units;
  if (total == 0) return;
  // From one unit of a thread to its next.
  const unsigned row_step = kGatherThreads / units, unit_step = kGatherThreads % units;
  const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * kChunk;
  for (unsigned long long start = static_cast<unsigned long long>(blockIdx.x) * kChunk; start < total; start += step) {
    // One wide division for the block, one of 32 bits for the thread; its other units follow by addition.
    const unsigned first = static_cast<unsigned>(start % units) + threadIdx.x;
    unsigned row = static_cast<unsigned>(start / units) + first / units;
    unsigned unit = first % units;
    long long source[kGatherUnroll];  // the unit that is read, or -1
#pragma unroll
    for (int k = 0; k < kGatherUnroll; ++k) {
      // Behind the last row an index is read all the same, the last one: a branch would part the loads.
      const unsigned known = row < total_rows ? row : total_rows - 1;
      const unsigned group = known / num_taken;
      const unsigned batch = heads == 1 ? group : group / heads;
      long long picked = index[static_cast<unsigned long long>(batch) * num_taken + (known - group * num_taken)];
      if (picked < 0) picked += num_rows;
      // Whoever points outside gets zeros: nothing is read there.
      const bool inside = picked >= 0 && picked < num_rows;
      source[k] = inside ? (static_cast<long long>(group) * num_rows + picked) * units + unit : -1;
      row += row_step;
      unit += unit_step;
      if (unit >= units) {
        unit -= units;
        ++row;
      }
    }
    Unit values[kGatherUnroll];
#pragma unroll
    for (int k = 0; k < kGatherUnroll; ++k) values[k] = source[k] < 0 ? Unit{} : from[source[k]];
#pragma unroll
    for (int k = 0; k < kGatherUnroll; ++k) {
      const unsigned long long place = start + threadIdx.x + k * kGatherThreads;
      if (place < total) to[place] = values[k];
    }
  }
}

// rows [B, H, M, D] of data [B, H, N, D] by index [B, M]; groups = B * H.
extern "C" __global__ void __launch_bounds__(kGatherThreads, 4)  // blocks a multiprocessor: registers for all loads
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

// SummaryPool: a group of rows is cut into parts of kRows. SummaryPartial pools each part by itself, SummaryMerge joins
// them. What stands between them, for each part, is its state: D weighted sums, the greatest score, the sum of weights.

__device__ inline float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

// What a state with greatest score `old_greatest` is scaled by where it is `greatest`. An empty state weighs nothing.
__device__ inline float shrink(float old_greatest, float greatest) {
  return old_greatest == minus_infinity() ? 0.0f : expf(old_greatest - greatest);
}

#ifdef SVCLI_SUMMARY_PARTIAL

constexpr int kPartialThreads = SVCLI_PARTIAL_THREADS;
constexpr int kPartialWarps = kPartialThreads / kWarpSize;
constexpr int kRows = SVCLI_PARTIAL_ROWS;
constexpr int kMaxWidth = SVCLI_PARTIAL_MAX_WIDTH;
constexpr int kWideLane = 128;   // elements of a row that a lane holds at most, in whole accesses
constexpr int kShortLane = 32;   // and where rows are short
constexpr int kSingleLane = 64;  // and one by one
constexpr int kChains = 4;       // additions that do not wait for each other

struct PartialShared {
  alignas(kAccessBytes) float scale[kMaxWidth];
  float partial[2][2 * kPartialWarps];
  float score[kRows];
};

template <int kCount>
struct alignas(kCount * sizeof(float)) Floats {
  float values[kCount];
};

template <typename Unit>
__device__ inline float element_of(const Unit& unit, int place) {
  return to_float(reinterpret_cast<const Element*>(&unit)[place]);
}

// Each value becomes its sum over the threads of the team. `partial` must not be that of the call before. A team of one
// warp waits for nobody.
template <int kTeamWarps, int kCount>
__device__ inline void team_sum(float (&values)[kCount], float* partial) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(kWholeWarp, values[i], offset);
  }
  if constexpr (kTeamWarps > 1) {
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
#pragma unroll
      for (int each = 0; each < kTeamWarps; ++each) values[i] += partial[(first + each) * kCount + i];
    }
  }
}

// The scores of the `count` rows of a part, into shared memory. A row lies in the registers of a team of warps, in units
// of `Unit`, so that it is read once for mean, variance and score. A unit stands in a row or behind it as a whole.
template <typename Unit, int kTeamWarps, int kLane>
__device__ void score_rows(const Element* rows, const Element* norm_weight, const Element* score_weight, int count,
                           int width, float epsilon, PartialShared& shared) {
  constexpr int kVector = sizeof(Unit) / sizeof(Element);
  constexpr int kUnits = kLane / kVector;
  constexpr int kTeamThreads = kTeamWarps * kWarpSize;
  constexpr int kTeams = kPartialWarps / kTeamWarps;
  constexpr int kSlots = kUnits * kTeamThreads;      // units of the longest row
  constexpr int kGroup = kVector < 4 ? kVector : 4;  // elements whose scales are read at once
  constexpr int kGroups = kVector / kGroup;
  const int team = threadIdx.x / kTeamThreads;
  const int member = threadIdx.x % kTeamThreads;
  const int units = width / kVector;
  const float inverse_width = 1.0f / width;

  // Group g of the scales of a lane's unit u. Lanes stand side by side, so that no two want the same bank.
  const auto scale_at = [&shared](int u, int g, int lane) -> Floats<kGroup>& {
    return reinterpret_cast<Floats<kGroup>*>(shared.scale)[(u * kGroups + g) * kTeamThreads + lane];
  };

  Unit held[kUnits];
  const auto load = [&](int row) {
    const auto* from = reinterpret_cast<const Unit*>(rows + static_cast<long long>(row) * width);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = u * kTeamThreads + member;
      held[u] = row < count && unit < units ? from[unit] : Unit{};
    }
  };
  load(team);  // on its way while the scales are made

  // norm_bias and score_bias move the scores of all rows alike, and a softmax does not see that.
#pragma unroll
  for (int each = 0; each < kSlots; each += kPartialThreads) {
    const int unit = each + threadIdx.x;
    if (kSlots % kPartialThreads != 0 && unit >= kSlots) break;
    const Unit norm = unit < units ? reinterpret_cast<const Unit*>(norm_weight)[unit] : Unit{};
    const Unit weight = unit < units ? reinterpret_cast<const Unit*>(score_weight)[unit] : Unit{};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      Floats<kGroup> scale;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        scale.values[j] = element_of(norm, g * kGroup + j) * element_of(weight, g * kGroup + j);
      }
      scale_at(unit / kTeamThreads, g, unit % kTeamThreads) = scale;
    }
  }
  __syncthreads();

  // Every team takes part in every round, with or without a row: team_sum may have a barrier.
  for (int first = 0; first < kRows; first += kTeams) {
    const int row = first + team;
    if (first > 0) load(row);

    float sums[kChains] = {};
#pragma unroll
    for (int i = 0; i < kLane; ++i) sums[i % kChains] += element_of(held[i / kVector], i % kVector);
    float mean[1] = {(sums[0] + sums[1]) + (sums[2] + sums[3])};
    team_sum<kTeamWarps>(mean, shared.partial[0]);
    mean[0] *= inverse_width;

    float squares[kChains] = {};
    float products[kChains] = {};
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      // Behind the row all is zero, and stays so. No branch keeps loads apart.
      const float centre = u * kTeamThreads + member < units ? mean[0] : 0.0f;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const Floats<kGroup> scale = scale_at(u, g, member);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const int chain = (u * kVector + j) % kChains;
          const float centred = element_of(held[u], g * kGroup + j) - centre;
          squares[chain] += centred * centred;
          products[chain] += centred * scale.values[j];
        }
      }
    }
    float spread[2] = {(squares[0] + squares[1]) + (squares[2] + squares[3]),
                       (products[0] + products[1]) + (products[2] + products[3])};
    team_sum<kTeamWarps>(spread, shared.partial[1]);
    const float score = spread[1] * rsqrtf(spread[0] * inverse_width + epsilon);
    if (member == 0) shared.score[row] = row < count ? score : minus_infinity();
  }
}

// The weighted sums of the `count` rows of a part. They are read again, from a cache: neighbours take neighbouring
// columns, and nobody has to add up what other threads hold.
template <typename Unit>
__device__ void sum_rows(const Element* rows, const float (&weight)[kRows], int count, int width, float* sums) {
  constexpr int kVector = sizeof(Unit) / sizeof(Element);
#pragma unroll 2
  for (int unit = threadIdx.x; unit < width / kVector; unit += kPartialThreads) {
    Unit held[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto* from = reinterpret_cast<const Unit*>(rows + static_cast<long long>(r) * width);
      held[r] = r < count ? from[unit] : Unit{};
    }
    Floats<kVector> sum = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum.values[j] += weight[r] * element_of(held[r], j);
    }
    reinterpret_cast<Floats<kVector>*>(sums)[unit] = sum;
  }
}

// partial [B, S, D + 2] of tokens [B, N, D], one block for each part. The last has as many rows as are left: none, where
// the group has none.
extern "C" __global__ void __launch_bounds__(kPartialThreads, 1)  // block a multiprocessor: registers for long rows
    SVCLI_ENTRY(summary_partial)(const Element* __restrict__ tokens, const Element* __restrict__ norm_weight,
                                 const Element* __restrict__ /*norm_bias*/, const Element* __restrict__ score_weight,
                                 const Element* __restrict__ /*score_bias*/, int num_images, int num_rows,
                                 int num_parts, int width, int epsilon_bits, float* __restrict__ partial) {
  SVCLI_SHARED(PartialShared, shared);
  const int image = blockIdx.x / num_parts;
  if (image >= num_images || width > kMaxWidth) return;
  const int first = (blockIdx.x - image * num_parts) * kRows;
  const int count = num_rows - first < kRows ? num_rows - first : kRows;
  const Element* rows = tokens + (static_cast<long long>(image) * num_rows + first) * width;
  float* sums = partial + static_cast<long long>(blockIdx.x) * (width + 2);
  const float epsilon = __int_as_float(epsilon_bits);

  const unsigned long long shared_alignment = address_of(tokens) | address_of(norm_weight) | address_of(score_weight) |
                                              static_cast<unsigned long long>(width * sizeof(Element));
  const bool wide = shared_alignment % kAccessBytes == 0;
  if (!wide) {
    score_rows<Element, 4, kSingleLane>(rows, norm_weight, score_weight, count, width, epsilon, shared);
  } else if (width <= kWarpSize * kShortLane) {
    score_rows<uint4, 1, kShortLane>(rows, norm_weight, score_weight, count, width, epsilon, shared);
  } else if (width <= kWarpSize * kWideLane) {
    score_rows<uint4, 1, kWideLane>(rows, norm_weight, score_weight, count, width, epsilon, shared);
  } else {
    score_rows<uint4, 2, kWideLane>(rows, norm_weight, score_weight, count, width, epsilon, shared);
  }
  __syncthreads();

  float greatest = minus_infinity();
#pragma unroll
  for (int r = 0; r < kRows; ++r) greatest = fmaxf(greatest, shared.score[r]);
  // What is not a number is never the greatest, and has a weight that is none either.
  float weight[kRows];
  float total = 0.0f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    weight[r] = r < count ? expf(shared.score[r] - greatest) : 0.0f;
    total += weight[r];
  }
  if (wide && address_of(partial) % sizeof(Floats<2>) == 0) {
    sum_rows<Pair>(rows, weight, count, width, sums);
  } else {
    sum_rows<Element>(rows, weight, count, width, sums);
  }
  if (threadIdx.x == 0) {
    sums[width] = greatest;
    sums[width + 1] = total;
  }
}

#endif  // SVCLI_SUMMARY_PARTIAL

#ifdef SVCLI_SUMMARY_MERGE

constexpr int kMergeThreads = SVCLI_MERGE_THREADS;
constexpr int kMergeWarps = kMergeThreads / kWarpSize;
constexpr int kMergeUnroll = SVCLI_MERGE_UNROLL;

struct MergeShared {
  float greatest[kMergeWarps];
  float total[kMergeWarps];
  float sum[kMergeWarps][kWarpSize];
};

// summary [B, 1, D] of partial [B, S, D + 2]. A block has one column for each lane; its warps take parts in turn, and are
// joined at the end. norm_weight tells TensorRT the type of the result, and the width.
extern "C" __global__ void __launch_bounds__(kMergeThreads)
    SVCLI_ENTRY(summary_merge)(const float* __restrict__ partial, const Element* __restrict__ /*norm_weight*/,
                               int num_images, int num_parts, int width, Element* __restrict__ summary) {
  SVCLI_SHARED(MergeShared, shared);
  const int blocks = (width + kWarpSize - 1) / kWarpSize;
  const int image = blockIdx.x / blocks;
  if (image >= num_images) return;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int column = (blockIdx.x - image * blocks) * kWarpSize + lane;
  const float* parts = partial + static_cast<long long>(image) * num_parts * (width + 2);

  float greatest = minus_infinity();
  float total = 0.0f;
  float sum = 0.0f;
  for (int first = warp; first < num_parts; first += kMergeWarps * kMergeUnroll) {
    float part_greatest[kMergeUnroll], part_total[kMergeUnroll], part_sum[kMergeUnroll];
#pragma unroll
    for (int k = 0; k < kMergeUnroll; ++k) {
      const int part = first + k * kMergeWarps;
      const float* from = parts + static_cast<long long>(part) * (width + 2);
      part_greatest[k] = part < num_parts ? from[width] : minus_infinity();
      part_total[k] = part < num_parts ? from[width + 1] : 0.0f;
      part_sum[k] = part < num_parts && column < width ? from[column] : 0.0f;
    }
    float new_greatest = greatest;
#pragma unroll
    for (int k = 0; k < kMergeUnroll; ++k) new_greatest = fmaxf(new_greatest, part_greatest[k]);
    const float rescale = shrink(greatest, new_greatest);
    greatest = new_greatest;
    total *= rescale;
    sum *= rescale;
#pragma unroll
    for (int k = 0; k < kMergeUnroll; ++k) {
      const float weight = shrink(part_greatest[k], greatest);
      total += part_total[k] * weight;
      sum += part_sum[k] * weight;
    }
  }
  if (lane == 0) {
    shared.greatest[warp] = greatest;
    shared.total[warp] = total;
  }
  shared.sum[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= width) return;

  greatest = minus_infinity();
#pragma unroll
  for (int each = 0; each < kMergeWarps; ++each) greatest = fmaxf(greatest, shared.greatest[each]);
  total = sum = 0.0f;
#pragma unroll
  for (int each = 0; each < kMergeWarps; ++each) {
    const float weight = shrink(shared.greatest[each], greatest);
    total += shared.total[each] * weight;
    sum += shared.sum[each][lane] * weight;
  }
  // No rows: zeros.
  summary[static_cast<long long>(image) * width + column] = from_float(total == 0.0f ? 0.0f : sum / total);
}

#endif  // SVCLI_SUMMARY_MERGE
