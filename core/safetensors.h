// Reads the safetensors format (https://github.com/huggingface/safetensors#format): 8 bytes
// little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]},
// "__metadata__": {string: string}}, then the data. The file is memory-mapped, and its header is
// checked against the file before anything is trusted: length, nesting, duplicate names, ranks and
// products (no overflow), offsets inside the data, sizes that match dtype and shape, no overlap, no
// hole. A broken file is INVALID_ARGUMENT (reason BAD_SAFETENSORS) with the tensor's name in the
// text.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/dtype.h"

namespace attn {

// A tensor's place in the mapped file; valid while the SafetensorsFile lives. Data may lie at any
// alignment.
struct SafetensorsEntry {
  DType dtype = DType::kUnspecified;  // kUnspecified: a dtype that attention does not need (F64,
                                      // I64, U8, ...)
  std::string dtype_name;             // as the file says it
  std::vector<std::int64_t> shape;
  const unsigned char* data = nullptr;
  std::size_t bytes = 0;
};

class SafetensorsFile {
 public:
  // `label` stands for the file in messages (a name that the caller knows, not a path).
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path,
                                                               const std::string& label);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::map<std::string, SafetensorsEntry>& entries() const { return entries_; }

 private:
  SafetensorsFile() = default;

  void* mapping_ = nullptr;
  std::size_t mapping_bytes_ = 0;
  std::map<std::string, SafetensorsEntry> entries_;
};

}  // namespace attn
