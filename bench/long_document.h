// Queries, keys and values with the structure that attention over long documents has: where the
// sparse implementation is measured. On independent Gaussian noise, its opposite, every block of
// keys matters alike and no selection can be good.
#pragma once

#include <cstdint>

namespace attn::bench {

// The model. A document is a chain of segments of min_segment to max_segment tokens, each of one
// topic; with return_probability a segment returns to an earlier topic, otherwise its topic is new.
// A key points towards its topic and, less so, towards its segment; 1 key in 32 is salient and does
// so more strongly. Queries come in spans of 16 to 64 tokens that ask, each query head for itself,
// for the segment that they stand in or, with reference_probability, for an earlier one: other
// segments of that topic then score 0.8 times as much. To this come a sink (the first 4 tokens,
// which every query scores high), a wandering state shared by the queries and keys of a KV head
// whose correlation is halved every local_half_life tokens, and independent noise.
//
// Scores below are what the parts add to the logit q . k / sqrt(head_dim), whatever head_dim is. A
// head's strengths vary: topic 0.8 to 1.1 times, local 0.5 to 1.2 times, sink plus or minus 1. With
// the defaults, at 32,768 tokens (128 dimensions, causal), a row's best 10 % of its 64-key blocks
// hold 0.91 to 0.96 of its attention (means of heads), the first block 0.08 to 0.44, its last four
// 0.17 to 0.40, and all others 0.34 to 0.51, five sixths of it in the best 10 %.
struct LongDocumentOptions {
  int64_t batch = 1;
  int64_t num_heads = 8;  // a multiple of num_kv_heads
  int64_t num_kv_heads = 8;
  int64_t length = 32768;  // of queries and of keys: self-attention
  int64_t head_dim = 128;
  int64_t value_dim = 128;
  uint64_t seed = 1;

  int64_t min_segment = 128;
  int64_t max_segment = 512;
  double return_probability = 0.7;
  double reference_probability = 0.4;
  double topic_score = 7.0;
  double sink_score = 10.0;
  double local_score = 4.5;
  double local_half_life = 32.0;
  double noise_score = 1.0;  // standard deviation
};

// query [batch, num_heads, length, head_dim], key [batch, num_kv_heads, length, head_dim], value
// [batch, num_kv_heads, length, value_dim]: contiguous float32, every element is written. The same
// options give the same numbers, up to rounding, on every machine. About 2 ns per element.
void MakeLongDocument(const LongDocumentOptions& options, float* query, float* key, float* value);

}  // namespace attn::bench
