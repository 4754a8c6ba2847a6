// Opens what must be a regular file: never blocks on a FIFO, never reads a device, never names the
// path in a message.
#pragma once

#include <cstddef>
#include <string>

#include "absl/status/statusor.h"

namespace attn {

// An open descriptor for reading and the file's size when it was opened. Closed with the object.
class RegularFile {
 public:
  // `label` stands for the file in messages; `reason` is that of the error (INVALID_ARGUMENT;
  // RESOURCE_EXHAUSTED where the process has no descriptor left).
  static absl::StatusOr<RegularFile> Open(const std::string& path, const std::string& label,
                                          const std::string& reason);
  RegularFile(RegularFile&& other) noexcept;
  RegularFile& operator=(RegularFile&& other) noexcept;
  ~RegularFile();

  int descriptor() const { return descriptor_; }
  std::size_t bytes() const { return bytes_; }

 private:
  RegularFile(int descriptor, std::size_t bytes) : descriptor_(descriptor), bytes_(bytes) {}

  int descriptor_ = -1;
  std::size_t bytes_ = 0;
};

// The whole file, if it has at most max_bytes.
absl::StatusOr<std::string> ReadRegularFile(const std::string& path, const std::string& label,
                                            const std::string& reason, std::size_t max_bytes);

}  // namespace attn
