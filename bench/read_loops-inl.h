// The read loops over the unit's vector VecRead (32 or 64 bytes; compiler extensions). Included by
// each limits_<isa>.cc inside its own namespace.

template <int kStreams, int kPrefetch>
inline uint64_t ReadStreams(const char* data, int64_t bytes, int64_t stride) {
  constexpr int kPerLine = 64 / static_cast<int>(sizeof(VecRead));
  VecRead sums[kStreams][kPerLine] = {};
  for (int64_t block = 0; block < bytes; block += kStreams * stride) {
    for (int64_t at = 0; at < stride; at += 64) {
#pragma GCC unroll 8
      for (int s = 0; s < kStreams; ++s) {
        const char* const line = data + block + s * stride + at;
        if (kPrefetch > 0) __builtin_prefetch(line + kPrefetch);
#pragma GCC unroll 4
        for (int i = 0; i < kPerLine; ++i) {
          sums[s][i] ^= reinterpret_cast<const VecRead*>(line)[i];
        }
      }
    }
  }
  VecRead all = {};
  for (int s = 0; s < kStreams; ++s) {
    for (int i = 0; i < kPerLine; ++i) all ^= sums[s][i];
  }
  uint64_t result = 0;
  for (int i = 0; i < static_cast<int>(sizeof(VecRead) / 8); ++i) result ^= all[i];
  return result;
}

#define ATTN_READ_TABLE                                                                          \
  {                                                                                              \
    {"1 stream", 1, &ReadStreams<1, 0>}, {"1 stream, prefetch 1 KiB", 1, &ReadStreams<1, 1024>}, \
        {"2 streams", 2, &ReadStreams<2, 0>},                                                    \
        {"2 streams, prefetch 1 KiB", 2, &ReadStreams<2, 1024>},                                 \
        {"4 streams", 4, &ReadStreams<4, 0>},                                                    \
        {"4 streams, prefetch 512 bytes", 4, &ReadStreams<4, 512>},                              \
        {"4 streams, prefetch 2 KiB", 4, &ReadStreams<4, 2048>},                                 \
        {"1 stream, prefetch 4 KiB", 1, &ReadStreams<1, 4096>},                                  \
  }
