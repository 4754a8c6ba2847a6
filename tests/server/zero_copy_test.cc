// No tensor byte is copied between what the codec yields and what the kernel reads and writes: an
// implementation that only notes the addresses it is given stands in for a kernel.
#include <gtest/gtest.h>

#include <cstring>
#include <future>

#include "tests/server/server_fixture.h"

namespace attn::server {
namespace {

namespace proto = attention::v1;

struct Seen {
  const void* query = nullptr;
  const void* past_key = nullptr;
  const void* key = nullptr;
  const void* value = nullptr;
  const void* mask = nullptr;
  const void* output = nullptr;
  const void* lse = nullptr;
};
Seen seen;

class NotingAttention final : public AttentionImplementation {
 public:
  absl::Status Attend(const kernels::AttentionArgs& args, const AttentionShape&,
                      ExecutionContext&) const override {
    const kernels::Sequence& row = args.sequences[0];
    seen = {row.query.data,
            row.spans[0].key.data,
            row.spans[1].key.data,
            row.spans[1].value.data,
            args.mask.data,
            row.output.data,
            row.lse};
    return absl::OkStatus();
  }
  MemoryUsage WorkspaceBytes(const AttentionShape&, int) const override { return {}; }
};

ImplementationRow NotingRow() {
  return {"noting", Traits(), [](const AttentionShape&) { return absl::OkStatus(); },
          [] { return std::unique_ptr<AttentionImplementation>(new NotingAttention); }};
}

TEST(ZeroCopyTest, KernelsReadTheDecodedBytesAndWriteTheBytesThatAreSent) {
  const std::vector<ImplementationRow> table = {NotingRow()};
  ServerState state(SmallServer(), table);
  proto::AttendRequest request = RandomAttend(1);
  *request.mutable_past_key_value()->mutable_inline_kv()->mutable_key() = request.key();
  *request.mutable_past_key_value()->mutable_inline_kv()->mutable_value() = request.value();
  *request.mutable_attention_mask() = MakeTensor({9, 18}, std::vector<float>(9 * 18));
  request.set_output_lse(true);
  absl::StatusOr<AttendCall> call = DecodeAttend(BytesOf(request.SerializeAsString(), 512));
  ASSERT_TRUE(call.ok()) << call.status();
  const AttendInputs decoded = call->inputs;

  std::promise<AttentionAnswer> answered;
  HandleAttend(state, *std::move(call), std::make_shared<CallContext>(),
               [&](absl::StatusOr<AttentionAnswer> answer) {
                 ASSERT_TRUE(answer.ok()) << answer.status();
                 answered.set_value(*std::move(answer));
               });
  const AttentionAnswer answer = answered.get_future().get();
  EXPECT_EQ(seen.query, decoded.query.data);
  EXPECT_EQ(seen.past_key, decoded.past_key.data);
  EXPECT_EQ(seen.key, decoded.key.data);
  EXPECT_EQ(seen.value, decoded.value.data);
  EXPECT_EQ(seen.mask, decoded.attention_mask.data);
  EXPECT_EQ(seen.output, answer.output.view.data);
  EXPECT_EQ(seen.lse, answer.lse.view.data);

  // What is sent holds these very addresses too.
  const Answer sent = EncodeAttend(answer);
  int found = 0;
  for (const AnswerPiece& piece : sent.pieces) {
    found += piece.data() == seen.output || piece.data() == seen.lse ? 1 : 0;
  }
  EXPECT_EQ(found, 2);
}

}  // namespace
}  // namespace attn::server
