// Makes safetensors files and model directories for tests, right ones and broken ones. Shares no
// code with the reader.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace attn::testing {

struct TestTensor {
  std::string name;
  std::string dtype;  // "F32", ...
  std::vector<std::int64_t> shape;
  std::string bytes;
};

// Element i is first + i / 8 (exact in every float dtype as long as it is small).
TestTensor FloatTensor(const std::string& name, const std::vector<std::int64_t>& shape,
                       float first = 0.0f);
// float16 or bfloat16 elements by their bits.
TestTensor HalfTensor(const std::string& name, const std::string& dtype,
                      const std::vector<std::int64_t>& shape,
                      const std::vector<std::uint16_t>& elements);

// The length, then `header` as it is, then `data`.
std::string WithHeader(const std::string& header, const std::string& data);
// A correct file.
std::string SafetensorsBytes(const std::vector<TestTensor>& tensors);

void WriteFile(const std::string& path, const std::string& bytes);

// A fresh directory that is removed with everything in it.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

}  // namespace attn::testing
