#include "core/benchmark_problem.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "core/cache_append.h"
#include "core/checked_math.h"
#include "core/dtype_conversion.h"
#include "core/error.h"
#include "core/projected_attention.h"

namespace attn {
namespace {

// xorshift64*: fast enough for gigabytes, the same values in every run.
class Generator {
 public:
  std::uint64_t Next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1dull;
  }
  // Uniform, of mean 0 and variance 1.
  float NextFloat() {
    constexpr float kWidth = 3.4641016f;  // 2 sqrt(3)
    return (static_cast<float>(Next() >> 40) * 0x1p-24f - 0.5f) * kWidth;
  }

 private:
  std::uint64_t state_ = 0x9e3779b97f4a7c15ull;
};

// `between` is called after every MiB or so and ends the work by an error.
absl::Status FillFloats(Generator& generator, const TensorView& view,
                        absl::FunctionRef<absl::Status()> between) {
  std::array<float, 4096> block;
  constexpr std::size_t kBlocksAtOnce = 64;
  char* const data = static_cast<char*>(const_cast<void*>(view.data));
  const auto count = static_cast<std::size_t>(view.num_elements());
  for (std::size_t i = 0; i < count; i += block.size()) {
    if (i % (kBlocksAtOnce * block.size()) == 0) ATTN_RETURN_IF_ERROR(between());
    const std::size_t length = std::min(block.size(), count - i);
    for (std::size_t j = 0; j < length; ++j) block[j] = generator.NextFloat();
    ConvertElements(block.data(), DType::kFloat32, data + i * ItemSize(view.dtype), view.dtype,
                    length);
  }
  return absl::OkStatus();
}

std::uint64_t BytesOf(DType dtype, const std::vector<std::int64_t>& shape) {
  return OutputSpec{dtype, shape}.bytes();
}

std::vector<std::int64_t> ExtentsOf(const TensorView& view) {
  return {view.extents.begin(), view.extents.begin() + view.rank};
}

// Stands in for an implementation and keeps copies of what it is asked to attend to.
class Capture final : public AttentionImplementation {
 public:
  explicit Capture(const AttendInputs& inputs) : inputs_(inputs) {}

  absl::Status Attend(const kernels::AttentionArgs& args, const AttentionShape&,
                      ExecutionContext&) const override {
    for (std::int64_t b = 0; b < args.num_sequences; ++b) {
      const kernels::Sequence& sequence = args.sequences[b];
      CopyRows(sequence.query, sequence.q_len, b, inputs_.query);
      std::int64_t at = 0;
      for (std::int64_t s = 0; s < sequence.num_spans; ++s) {
        const kernels::KeyValueSpan& span = sequence.spans[s];
        CopyRows(span.key, span.length, b, inputs_.key, at);
        CopyRows(span.value, span.length, b, inputs_.value, at);
        at += span.length;
      }
    }
    return absl::OkStatus();
  }
  MemoryUsage WorkspaceBytes(const AttentionShape&, int) const override { return {}; }

 private:
  // `to` is [batch, length, heads, dim].
  static void CopyRows(const kernels::RowsView& from, std::int64_t length, std::int64_t batch,
                       const TensorView& to, std::int64_t at = 0) {
    const auto item = static_cast<std::int64_t>(ItemSize(to.dtype));
    const auto row_bytes = static_cast<std::size_t>(to.extent(3) * item);
    char* const target = static_cast<char*>(const_cast<void*>(to.data));
    for (std::int64_t row = 0; row < length; ++row) {
      for (std::int64_t head = 0; head < to.extent(2); ++head) {
        const char* const source = static_cast<const char*>(from.data) +
                                   (row * from.row_stride + head * from.head_stride) * item;
        std::memcpy(
            target +
                (batch * to.stride(0) + (at + row) * to.stride(1) + head * to.stride(2)) * item,
            source, row_bytes);
      }
    }
  }

  const AttendInputs& inputs_;
};

}  // namespace

absl::Status BenchmarkProblem::Find() {
  if (target_.pool->model() == nullptr) {
    return InvalidField("layer.model",
                        "layer.model is missing: a benchmark needs a hosted model's layer");
  }
  ATTN_ASSIGN_OR_RETURN(layer_, target_.pool->model()->Find(target_.layer));
  return absl::OkStatus();
}

// Without addresses: what is refused is refused before it is allocated.
AttendInputs BenchmarkProblem::InputsOf(const BenchmarkShape& shape) const {
  const LayerSpec& spec = *layer_->spec;
  const DType dtype = shape.dtype == DType::kUnspecified ? layer_->dtype : shape.dtype;
  AttendInputs inputs;
  inputs.layout = TensorLayout::kTokensFirst;
  inputs.query =
      TensorView(nullptr, dtype, {shape.batch, shape.q_len, spec.num_heads, spec.head_dim});
  inputs.key =
      TensorView(nullptr, dtype, {shape.batch, shape.kv_len, spec.num_kv_heads, spec.head_dim});
  inputs.value =
      TensorView(nullptr, dtype, {shape.batch, shape.kv_len, spec.num_kv_heads, spec.value_dim});
  inputs.query_lengths = shape.query_lengths;
  inputs.kv_lengths = shape.kv_lengths;
  if (shape.has_mask) {
    inputs.attention_mask =
        TensorView(nullptr, DType::kBool, {shape.batch, 1, shape.q_len, shape.kv_len});
  }
  if (shape.output_attentions) inputs.stage = kernels::ScoreStage::kProbabilities;
  inputs.output_lse = shape.output_lse;
  return inputs;
}

absl::StatusOr<TensorView> BenchmarkProblem::Allocate(DType dtype,
                                                      const std::vector<std::int64_t>& shape) {
  Device& device = target_.pool->managers().front()->device();
  ATTN_ASSIGN_OR_RETURN(Buffer buffer, device.Allocate(BytesOf(dtype, shape)));
  buffers_.push_back(std::move(buffer));
  return TensorView(buffers_.back().data.get(), dtype, shape.data(),
                    static_cast<int>(shape.size()));
}

absl::Status BenchmarkProblem::Prepare(const BenchmarkShape& shape) {
  const std::pair<const char*, std::int64_t> counts[] = {
      {"shape.batch", shape.batch}, {"shape.q_len", shape.q_len}, {"shape.kv_len", shape.kv_len}};
  for (const auto& [field, count] : counts) {
    if (count < 1) {
      return InvalidField(field, absl::StrCat(field, " is ", count, ", but must be 1 or more"));
    }
    if (count > target_.max_tokens) {
      return InvalidField(field, absl::StrCat(field, " is ", count, ", more than the limit of ",
                                              target_.max_tokens, " tokens"));
    }
  }
  if (shape.dtype != DType::kUnspecified && !IsFloating(shape.dtype)) {
    return InvalidField("shape.dtype", absl::StrCat("shape.dtype is ", DTypeName(shape.dtype),
                                                    ", but must be a floating dtype"));
  }
  inputs_ = InputsOf(shape);
  AttendInputs planned_inputs = inputs_;
  planned_inputs.attention_mask = TensorView();  // whose values would be looked at
  ATTN_ASSIGN_OR_RETURN(
      const AttentionProblem planned,
      AttentionProblem::Create(planned_inputs, layer_->spec.get(), target_.max_tokens));
  std::uint64_t keys = 0;
  for (const TensorView* view : {&inputs_.key, &inputs_.value}) {
    keys = SaturatingAdd(keys, BytesOf(view->dtype, ExtentsOf(*view)));
  }
  bytes_ = SaturatingAdd(planned.outputs().bytes(), planned.owned_bytes());
  for (const TensorView* view : {&inputs_.query, &inputs_.attention_mask}) {
    if (view->defined()) bytes_ = SaturatingAdd(bytes_, BytesOf(view->dtype, ExtentsOf(*view)));
  }
  bytes_ = SaturatingAdd(bytes_, keys);
  // Pages are whole blocks of 64 tokens, at most float32 where the cache is wider than the tensors.
  if (shape.cached) {
    const std::uint64_t padded = SaturatingMultiply(keys / static_cast<std::uint64_t>(shape.kv_len),
                                                    (shape.kv_len + 127) / 64 * 64);
    bytes_ = SaturatingAdd(bytes_, SaturatingMultiply(padded, 4 / ItemSize(inputs_.key.dtype)));
  }
  if (bytes_ > target_.max_bytes) {
    return MakeError(absl::StatusCode::kResourceExhausted, "BENCHMARK_BYTES",
                     absl::StrCat("the sample's tensors take ", bytes_, " bytes, more than the ",
                                  target_.max_bytes, " that the benchmark may use"),
                     {{"bytes", absl::StrCat(bytes_)}});
  }
  if (target_.reserve) ATTN_RETURN_IF_ERROR(target_.reserve(bytes_));
  for (TensorView* view : {&inputs_.query, &inputs_.key, &inputs_.value, &inputs_.attention_mask}) {
    if (!view->defined()) continue;
    ATTN_ASSIGN_OR_RETURN(*view, Allocate(view->dtype, ExtentsOf(*view)));
  }
  return absl::OkStatus();
}

absl::Status BenchmarkProblem::FillRandom(BenchmarkRunner& runner,
                                          BenchmarkClock::time_point deadline) {
  Generator generator;
  BenchmarkClock::time_point start = BenchmarkClock::now();
  const auto between = [&]() -> absl::Status {
    const BenchmarkClock::time_point now = BenchmarkClock::now();
    if (now >= deadline) {
      return absl::DeadlineExceededError(
          "the benchmark's time was over before its sample was made");
    }
    const std::chrono::duration<double> rest =
        (now - start) * ((1.0 - target_.share) / target_.share);
    const auto until = now + std::chrono::duration_cast<BenchmarkClock::duration>(rest);
    ATTN_RETURN_IF_ERROR(runner.PauseUntil(std::min(until, deadline)));
    start = BenchmarkClock::now();
    return absl::OkStatus();
  };
  for (const TensorView* view : {&inputs_.query, &inputs_.key, &inputs_.value}) {
    ATTN_RETURN_IF_ERROR(FillFloats(generator, *view, between));
  }
  if (!inputs_.attention_mask.defined()) return absl::OkStatus();
  auto* const mask = static_cast<std::uint8_t*>(const_cast<void*>(inputs_.attention_mask.data));
  const std::int64_t count = inputs_.attention_mask.num_elements();
  for (std::int64_t i = 0; i < count; ++i) mask[i] = generator.Next() >> 61 != 0 ? 1 : 0;
  return absl::OkStatus();
}

absl::Status BenchmarkProblem::MakePlain() {
  ATTN_ASSIGN_OR_RETURN(AttentionProblem plain,
                        AttentionProblem::Create(inputs_, layer_->spec.get(), target_.max_tokens));
  plain_ = std::make_unique<AttentionProblem>(std::move(plain));
  problem_ = plain_.get();
  return absl::OkStatus();
}

// Appends all keys to caches of its own, as calls on sessions would, and has the queries read them.
absl::Status BenchmarkProblem::FillCache(const BenchmarkShape& shape, BenchmarkRunner& runner,
                                         BenchmarkClock::time_point deadline) {
  Device& device = target_.pool->managers().front()->device();
  cache_ = std::make_shared<CachePool>(device, target_.max_bytes);
  SessionOptions options;
  options.rollback_tokens = static_cast<std::uint64_t>(shape.q_len);  // that windows keep
  for (std::int64_t b = 0; b < shape.batch; ++b) {
    ATTN_ASSIGN_OR_RETURN(sessions_.emplace_back(),
                          Session::Create(absl::StrCat("benchmark ", b), target_.pool, cache_,
                                          options, SessionClock::now()));
  }
  const CacheKey key{target_.layer.stack, target_.layer.layer, target_.layer.kind};
  {
    ATTN_ASSIGN_OR_RETURN(const std::shared_ptr<CacheCall> appending,
                          CacheCall::Create(sessions_, key, layer_, CacheRequest()));
    AttendInputs append = inputs_;
    append.query.extents[1] = 0;
    append.query_lengths.clear();
    append.attention_mask = TensorView();
    append.stage = kernels::ScoreStage::kNone;
    append.output_lse = false;
    append.cache = &appending->rows();
    ATTN_ASSIGN_OR_RETURN(AttentionProblem problem,
                          AttentionProblem::Create(append, layer_->spec.get(), target_.max_tokens));
    ATTN_RETURN_IF_ERROR(ReserveCache(problem, *appending));
    ATTN_RETURN_IF_ERROR(runner.Execute(
        [&](const bool*) { AppendToCache(problem, *appending, device.executor()); }, deadline));
    appending->Commit();
  }
  CacheRequest read;
  read.mode = CacheMode::kReadOnly;
  ATTN_ASSIGN_OR_RETURN(reading_, CacheCall::Create(sessions_, key, layer_, read));
  AttendInputs cached = inputs_;
  cached.key = cached.value = TensorView();
  cached.kv_lengths.clear();
  cached.cache = &reading_->rows();
  ATTN_ASSIGN_OR_RETURN(AttentionProblem paged,
                        AttentionProblem::Create(cached, layer_->spec.get(), target_.max_tokens));
  paged_ = std::make_unique<AttentionProblem>(std::move(paged));
  ATTN_RETURN_IF_ERROR(ReserveCache(*paged_, *reading_));
  problem_ = paged_.get();
  return absl::OkStatus();
}

absl::Status BenchmarkProblem::BindOutputs() {
  first_output_ = buffers_.size();
  AttendOutputs outputs;
  const AttentionProblem::Outputs& specs = problem_->outputs();
  const std::pair<const OutputSpec*, MutableTensorView*> wanted[] = {
      {&specs.output, &outputs.output},
      {&specs.attention_weights, &outputs.attention_weights},
      {&specs.lse, &outputs.lse}};
  for (const auto& [spec, view] : wanted) {
    if (!spec->defined()) continue;
    ATTN_ASSIGN_OR_RETURN(const TensorView made, Allocate(spec->dtype, spec->shape));
    *view = MutableTensorView(const_cast<void*>(made.data), spec->dtype, spec->shape.data(),
                              static_cast<int>(spec->shape.size()));
  }
  problem_->Bind(outputs);
  return absl::OkStatus();
}

void BenchmarkProblem::PoisonOutputs() {
  for (std::size_t i = first_output_; i < buffers_.size(); ++i) {
    if (buffers_[i].bytes > 0) std::memset(buffers_[i].data.get(), 0xff, buffers_[i].bytes);
  }
}

absl::StatusOr<std::unique_ptr<BenchmarkProblem>> BenchmarkProblem::Random(
    const BenchmarkTarget& target, const BenchmarkShape& shape, BenchmarkRunner& runner,
    BenchmarkClock::time_point deadline) {
  auto problem = std::unique_ptr<BenchmarkProblem>(new BenchmarkProblem(target));
  ATTN_RETURN_IF_ERROR(problem->Find());
  ATTN_RETURN_IF_ERROR(problem->Prepare(shape));
  ATTN_RETURN_IF_ERROR(problem->FillRandom(runner, deadline));
  ATTN_RETURN_IF_ERROR(problem->MakePlain());
  if (shape.cached) ATTN_RETURN_IF_ERROR(problem->FillCache(shape, runner, deadline));
  ATTN_RETURN_IF_ERROR(problem->BindOutputs());
  return problem;
}

absl::StatusOr<std::unique_ptr<BenchmarkProblem>> BenchmarkProblem::FromHiddenStates(
    const BenchmarkTarget& target, const TensorView& hidden_states, Workspace& workspace,
    BenchmarkRunner& runner, BenchmarkClock::time_point deadline) {
  auto problem = std::unique_ptr<BenchmarkProblem>(new BenchmarkProblem(target));
  ATTN_RETURN_IF_ERROR(problem->Find());
  ATTN_RETURN_IF_ERROR(RequireWeights(*problem->layer_, target.layer.model));
  if (hidden_states.rank != 3) {
    return InvalidField("hidden_states",
                        absl::StrCat("hidden_states has shape ", ShapeText(hidden_states),
                                     ", but must have rank 3"));
  }
  ForwardInputs forward;
  forward.hidden_states = hidden_states;
  const HostedLayer& layer = *problem->layer_;
  ATTN_ASSIGN_OR_RETURN(const ForwardPlan plan,
                        ProjectedAttention(layer, nullptr, target.max_tokens).Plan(forward));
  BenchmarkShape shape;
  shape.batch = hidden_states.extent(0);
  shape.q_len = shape.kv_len = hidden_states.extent(1);
  ATTN_RETURN_IF_ERROR(problem->Prepare(shape));
  ATTN_ASSIGN_OR_RETURN(const TensorView output,
                        problem->Allocate(plan.outputs.output.dtype, plan.outputs.output.shape));
  const ProjectedAttention module(layer, std::make_shared<Capture>(problem->inputs_),
                                  target.max_tokens);
  Device& device = target.pool->managers().front()->device();
  absl::Status captured;
  ATTN_RETURN_IF_ERROR(runner.Execute(
      [&](const bool* stop) {
        workspace.Reset();
        ExecutionContext context{device, workspace, stop};
        ForwardOutputs outputs;
        outputs.output = MutableTensorView(const_cast<void*>(output.data), output.dtype,
                                           output.extents.data(), output.rank);
        captured = GuardMemory([&] { return module.Forward(forward, outputs, context); });
        workspace.Reset();
      },
      deadline));
  ATTN_RETURN_IF_ERROR(captured);
  problem->buffers_.pop_back();  // the layer's output
  ATTN_RETURN_IF_ERROR(problem->MakePlain());
  ATTN_RETURN_IF_ERROR(problem->BindOutputs());
  return problem;
}

}  // namespace attn
