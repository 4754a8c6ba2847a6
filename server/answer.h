// An answer's bytes: pieces that are sent one after the other, tensors from where they were
// computed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/device.h"

namespace attn::server {

struct AnswerPiece {
  std::string header;  // owned bytes, if `buffer` is empty
  Buffer buffer;

  const void* data() const { return buffer.data ? buffer.data.get() : header.data(); }
  std::size_t size() const { return buffer.data ? buffer.bytes : header.size(); }
};

struct Answer {
  std::vector<AnswerPiece> pieces;

  std::uint64_t bytes() const {
    std::uint64_t total = 0;
    for (const AnswerPiece& piece : pieces) total += piece.size();
    return total;
  }
};

}  // namespace attn::server
