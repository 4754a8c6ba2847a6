#include "tests/core/safetensors_writer.h"

#include <stdlib.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>

namespace attn::testing {

TestTensor FloatTensor(const std::string& name, const std::vector<std::int64_t>& shape,
                       float first) {
  std::int64_t count = 1;
  for (std::int64_t extent : shape) count *= extent;
  std::string bytes(static_cast<std::size_t>(count) * sizeof(float), '\0');
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = first + static_cast<float>(i) / 8.0f;
    std::memcpy(bytes.data() + static_cast<std::size_t>(i) * sizeof(float), &value, sizeof(value));
  }
  return {name, "F32", shape, bytes};
}

TestTensor HalfTensor(const std::string& name, const std::string& dtype,
                      const std::vector<std::int64_t>& shape,
                      const std::vector<std::uint16_t>& elements) {
  std::string bytes(elements.size() * sizeof(std::uint16_t), '\0');
  std::memcpy(bytes.data(), elements.data(), bytes.size());
  return {name, dtype, shape, bytes};
}

std::string WithHeader(const std::string& header, const std::string& data) {
  std::string length(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) {
    length[i] = static_cast<char>(static_cast<std::uint64_t>(header.size()) >> (8 * i));
  }
  return length + header + data;
}

std::string SafetensorsBytes(const std::vector<TestTensor>& tensors) {
  std::string header = R"({"__metadata__":{"format":"pt"})";
  std::string data;
  for (const TestTensor& tensor : tensors) {
    std::string shape;
    for (std::int64_t extent : tensor.shape) {
      shape += (shape.empty() ? "" : ",") + std::to_string(extent);
    }
    header += ",\"" + tensor.name + R"(":{"dtype":")" + tensor.dtype + R"(","shape":[)" + shape +
              R"(],"data_offsets":[)" + std::to_string(data.size()) + "," +
              std::to_string(data.size() + tensor.bytes.size()) + "]}";
    data += tensor.bytes;
  }
  return WithHeader(header + "}", data);
}

void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) throw std::runtime_error("can't write " + path);
}

TemporaryDirectory::TemporaryDirectory() {
  std::string pattern = (std::filesystem::temp_directory_path() / "attnd_test_XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("can't make " + pattern);
  path_ = pattern;
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace attn::testing
