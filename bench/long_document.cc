#include "bench/long_document.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace attn::bench {
namespace {

constexpr int64_t kSinkTokens = 4;
constexpr int64_t kMinSpan = 16;
constexpr int64_t kMaxSpan = 64;
// What of a direction is the topic's; the rest is the segment's own.
constexpr double kTopicShare = 0.9;

// SplitMix64: a stream for every purpose, so that heads can be made in any order.
class Random {
 public:
  Random(uint64_t seed, uint64_t purpose, int64_t index)
      : state_(seed * 0x9e3779b97f4a7c15u ^ (purpose << 56) ^ static_cast<uint64_t>(index) << 24) {
    state_ = Next();
  }

  uint64_t Next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }

  double Uniform(double low, double high) {
    return low + (high - low) * static_cast<double>(Next() >> 11) * 0x1p-53;
  }

  int64_t Between(int64_t low, int64_t high) {  // both ends included
    return low + static_cast<int64_t>(Next() % static_cast<uint64_t>(high - low + 1));
  }

  // Mean 0, variance 1: the sum of four uniform numbers, near enough to Gaussian, for one draw.
  float Noise() {
    const uint64_t bits = Next();
    const int64_t sum = static_cast<int64_t>((bits & 0xffff) + (bits >> 16 & 0xffff) +
                                             (bits >> 32 & 0xffff) + (bits >> 48));
    return static_cast<float>(sum - 2 * 0xffff) * static_cast<float>(1.7320508075688772 / 0x1p16);
  }

 private:
  uint64_t state_;
};

enum Purpose : uint64_t { kSegments = 1, kDirections, kKeys, kState, kQueries, kSpans, kValues };

struct Segment {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t topic = 0;
};

std::vector<Segment> MakeSegments(const LongDocumentOptions& options, int64_t batch) {
  Random random(options.seed, kSegments, batch);
  std::vector<Segment> segments;
  int64_t topics = 0;
  for (int64_t at = 0; at < options.length;) {
    const int64_t tokens = random.Between(options.min_segment, options.max_segment);
    const bool returns = topics > 1 && random.Uniform(0, 1) < options.return_probability;
    int64_t topic = returns ? random.Between(0, topics - 1) : topics++;
    if (returns && topic == segments.back().topic) topic = (topic + 1) % topics;
    segments.push_back({at, std::min(at + tokens, options.length), topic});
    at += tokens;
  }
  return segments;
}

// Rows of unit length.
std::vector<float> UnitVectors(Random& random, int64_t count, int64_t dim) {
  std::vector<float> vectors(static_cast<std::size_t>(count * dim));
  for (int64_t i = 0; i < count; ++i) {
    float* const row = &vectors[static_cast<std::size_t>(i * dim)];
    double squares = 0;
    for (int64_t d = 0; d < dim; ++d) {
      row[d] = random.Noise();
      squares += static_cast<double>(row[d]) * static_cast<double>(row[d]);
    }
    const float norm = static_cast<float>(1.0 / std::sqrt(std::max(squares, 1e-30)));
    for (int64_t d = 0; d < dim; ++d) row[d] *= norm;
  }
  return vectors;
}

// A unit vector for each segment: its topic's with a turn of its own.
std::vector<float> SegmentDirections(const std::vector<Segment>& segments, int64_t dim,
                                     Random random) {
  const int64_t count = static_cast<int64_t>(segments.size());
  std::vector<float> own = UnitVectors(random, count, dim);
  const std::vector<float> topics = UnitVectors(random, count, dim);
  const float topic_part = static_cast<float>(kTopicShare);
  const float own_part = static_cast<float>(std::sqrt(1 - kTopicShare * kTopicShare));
  for (int64_t s = 0; s < count; ++s) {
    const float* const topic =
        &topics[static_cast<std::size_t>(segments[static_cast<std::size_t>(s)].topic * dim)];
    float* const row = &own[static_cast<std::size_t>(s * dim)];
    for (int64_t d = 0; d < dim; ++d) row[d] = topic_part * topic[d] + own_part * row[d];
  }
  return own;
}

// The length of a vector whose product with a like one adds `score` to the logit.
float Magnitude(double score, int64_t head_dim) {
  return static_cast<float>(std::sqrt(score * std::sqrt(static_cast<double>(head_dim))));
}

void AddScaled(float factor, const float* from, int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; ++d) to[d] += factor * from[d];
}

// One KV head of one document and the query heads that share it.
class HeadMaker {
 public:
  HeadMaker(const LongDocumentOptions& options, const std::vector<Segment>& segments, int64_t index)
      : options_(options), segments_(segments), index_(index), dim_(options.head_dim) {
    Random random(options.seed, kDirections, index);
    sink_ = UnitVectors(random, 1, dim_);
    directions_ = SegmentDirections(segments, dim_, random);
    MakeState();
  }

  void MakeKeys(float* key) const {
    Random random(options_.seed, kKeys, index_);
    const float noise = static_cast<float>(std::sqrt(options_.noise_score));
    const float topic = Magnitude(options_.topic_score, dim_);
    const float local = Magnitude(options_.local_score / static_cast<double>(dim_), dim_);
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      for (int64_t i = segments_[s].begin; i < segments_[s].end; ++i) {
        float* const row = key + i * dim_;
        const double salience = random.Next() % 32 == 0 ? 1.4 : random.Uniform(0.7, 1.1);
        for (int64_t d = 0; d < dim_; ++d) row[d] = noise * random.Noise();
        AddScaled(topic * static_cast<float>(salience), Direction(s), dim_, row);
        AddScaled(local, State(i), dim_, row);
        if (i < kSinkTokens) {
          AddScaled(Magnitude(options_.sink_score, dim_), sink_.data(), dim_, row);
        }
      }
    }
  }

  void MakeQueries(int64_t head, float* query) const {
    Random random(options_.seed, kQueries, head);
    Random spans(options_.seed, kSpans, head);
    const float noise = static_cast<float>(std::sqrt(options_.noise_score));
    const float topic =
        Magnitude(options_.topic_score, dim_) * static_cast<float>(random.Uniform(0.8, 1.1));
    const float local = Magnitude(options_.local_score / static_cast<double>(dim_), dim_) *
                        static_cast<float>(random.Uniform(0.5, 1.2));
    const double sink_score = options_.sink_score + random.Uniform(-1, 1);
    const float sink =
        Magnitude(options_.sink_score, dim_) * static_cast<float>(sink_score / options_.sink_score);
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      std::size_t asked = s;
      int64_t span_end = segments_[s].begin;
      for (int64_t i = segments_[s].begin; i < segments_[s].end; ++i) {
        if (i == span_end) {
          asked = AskedSegment(s, spans);
          span_end += spans.Between(kMinSpan, kMaxSpan);
        }
        float* const row = query + i * dim_;
        for (int64_t d = 0; d < dim_; ++d) row[d] = noise * random.Noise();
        AddScaled(topic * static_cast<float>(random.Uniform(0.8, 1.1)), Direction(asked), dim_,
                  row);
        AddScaled(local, State(i), dim_, row);
        AddScaled(sink, sink_.data(), dim_, row);
      }
    }
  }

  void MakeValues(float* value) const {
    const int64_t dim = options_.value_dim;
    Random random(options_.seed, kValues, index_);
    const std::vector<float> directions = SegmentDirections(segments_, dim, random);
    const float topic = static_cast<float>(std::sqrt(static_cast<double>(dim)));
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      for (int64_t i = segments_[s].begin; i < segments_[s].end; ++i) {
        float* const row = value + i * dim;
        for (int64_t d = 0; d < dim; ++d) row[d] = random.Noise();
        AddScaled(topic, &directions[s * static_cast<std::size_t>(dim)], dim, row);
      }
    }
  }

 private:
  // An autoregressive process of variance 1 in each dimension.
  void MakeState() {
    Random random(options_.seed, kState, index_);
    const double kept = std::exp2(-1.0 / options_.local_half_life);
    const float keep = static_cast<float>(kept);
    const float renew = static_cast<float>(std::sqrt(1 - kept * kept));
    state_.resize(static_cast<std::size_t>(options_.length * dim_));
    for (int64_t d = 0; d < dim_; ++d) state_[static_cast<std::size_t>(d)] = random.Noise();
    for (int64_t i = dim_; i < options_.length * dim_; ++i) {
      state_[static_cast<std::size_t>(i)] =
          keep * state_[static_cast<std::size_t>(i - dim_)] + renew * random.Noise();
    }
  }

  std::size_t AskedSegment(std::size_t segment, Random& spans) const {
    const bool refers = segment > 0 && spans.Uniform(0, 1) < options_.reference_probability;
    if (!refers) return segment;
    return static_cast<std::size_t>(spans.Between(0, static_cast<int64_t>(segment) - 1));
  }

  const float* Direction(std::size_t segment) const {
    return &directions_[segment * static_cast<std::size_t>(dim_)];
  }
  const float* State(int64_t token) const {
    return &state_[static_cast<std::size_t>(token * dim_)];
  }

  const LongDocumentOptions& options_;
  const std::vector<Segment>& segments_;
  const int64_t index_;
  const int64_t dim_;
  std::vector<float> sink_;
  std::vector<float> directions_;  // [segments, head_dim]
  std::vector<float> state_;       // [length, head_dim]
};

}  // namespace

void MakeLongDocument(const LongDocumentOptions& options, float* query, float* key, float* value) {
  if (options.length == 0) return;
  const int64_t group = options.num_heads / options.num_kv_heads;
  const int64_t head_size = options.length * options.head_dim;
  for (int64_t b = 0; b < options.batch; ++b) {
    const std::vector<Segment> segments = MakeSegments(options, b);
    for (int64_t h = 0; h < options.num_kv_heads; ++h) {
      const int64_t index = b * options.num_kv_heads + h;
      const HeadMaker maker(options, segments, index);
      maker.MakeKeys(key + index * head_size);
      maker.MakeValues(value + index * options.length * options.value_dim);
      for (int64_t g = 0; g < group; ++g) {
        const int64_t head = index * group + g;
        maker.MakeQueries(head, query + head * head_size);
      }
    }
  }
}

}  // namespace attn::bench
