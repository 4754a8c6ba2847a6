#include "server/wire_limits.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/wire_format_lite.h>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn::server {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;

class WireCounter {
 public:
  WireCounter(CodedInputStream& input, const WireLimits& limits) : input_(input), limits_(limits) {}

  // The fields of a message of this type up to the stream's current limit; a null type is not
  // known, and is not looked into.
  absl::Status Count(const Descriptor* type, int depth) {
    if (depth > limits_.max_depth) return Malformed();
    while (true) {
      const std::uint32_t tag = input_.ReadTag();
      if (tag == 0) return input_.ConsumedEntireMessage() ? absl::OkStatus() : Malformed();
      ATTN_RETURN_IF_ERROR(Add(1));
      const FieldDescriptor* const field =
          type->FindFieldByNumber(WireFormatLite::GetTagFieldNumber(tag));
      ATTN_RETURN_IF_ERROR(CountValue(tag, field, depth));
    }
  }

 private:
  static absl::Status Malformed() {
    return MakeError(absl::StatusCode::kInvalidArgument, "MALFORMED_MESSAGE",
                     "the bytes are not a message of this rpc's request type");
  }

  absl::Status Add(std::int64_t entries) {
    entries_ += entries;
    if (entries_ <= limits_.max_entries) return absl::OkStatus();
    return MakeError(
        absl::StatusCode::kInvalidArgument, "TOO_MANY_ENTRIES",
        absl::StrCat("the message has more than ", limits_.max_entries, " fields and entries"),
        {{"max_entries", absl::StrCat(limits_.max_entries)}});
  }

  absl::Status CountValue(std::uint32_t tag, const FieldDescriptor* field, int depth) {
    std::uint64_t ignored = 0;
    std::uint32_t ignored32 = 0;
    switch (WireFormatLite::GetTagWireType(tag)) {
      case WireFormatLite::WIRETYPE_VARINT:
        return input_.ReadVarint64(&ignored) ? absl::OkStatus() : Malformed();
      case WireFormatLite::WIRETYPE_FIXED64:
        return input_.ReadLittleEndian64(&ignored) ? absl::OkStatus() : Malformed();
      case WireFormatLite::WIRETYPE_FIXED32:
        return input_.ReadLittleEndian32(&ignored32) ? absl::OkStatus() : Malformed();
      case WireFormatLite::WIRETYPE_LENGTH_DELIMITED:
        return CountDelimited(field, depth);
      default:
        return Malformed();  // groups: none of our messages has any
    }
  }

  absl::Status CountDelimited(const FieldDescriptor* field, int depth) {
    std::uint32_t length = 0;
    if (!input_.ReadVarint32(&length) || length > INT32_MAX) return Malformed();
    const int size = static_cast<int>(length);
    if (field != nullptr && field->type() == FieldDescriptor::TYPE_MESSAGE) {
      const CodedInputStream::Limit outer = input_.PushLimit(size);
      // A limit beyond the enclosing one is cut to it: the length lied.
      if (input_.BytesUntilLimit() != size) return Malformed();
      ATTN_RETURN_IF_ERROR(Count(field->message_type(), depth + 1));
      input_.PopLimit(outer);
      return absl::OkStatus();
    }
    if (field != nullptr && field->is_packable()) {
      // One byte is the least that a packed value takes, or the width of its fixed type.
      const bool wide = field->type() == FieldDescriptor::TYPE_FLOAT ||
                        field->type() == FieldDescriptor::TYPE_DOUBLE;
      ATTN_RETURN_IF_ERROR(Add(wide ? size / 4 : size));
    }
    return input_.Skip(size) ? absl::OkStatus() : Malformed();
  }

  CodedInputStream& input_;
  const WireLimits limits_;
  std::int64_t entries_ = 0;
};

}  // namespace

absl::Status CheckWire(google::protobuf::io::ZeroCopyInputStream& bytes,
                       const google::protobuf::Descriptor& type, const WireLimits& limits) {
  CodedInputStream input(&bytes);
  input.SetTotalBytesLimit(INT32_MAX);
  return WireCounter(input, limits).Count(&type, 0);
}

}  // namespace attn::server
