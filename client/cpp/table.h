// Text for people: aligned tables and numbers with units.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace attn::client {

// Columns as wide as their widest cell, two spaces apart; the last one is not padded. Cells may be
// UTF-8; control characters in them (they may come from a server) become '?'.
class Table {
 public:
  // No header: Table({}).
  explicit Table(std::vector<std::string> header);

  // Missing cells at the end are empty.
  void AddRow(std::vector<std::string> cells);

  std::string Render() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

std::string BytesText(uint64_t bytes);        // "1.5 MiB"
std::string SecondsText(double seconds);      // "12.3 µs", "4.56 ms", "2 min 5 s"
std::string CountText(double count);          // "1.23 G": decimal, for operations
std::string OrDash(const std::string& text);  // "-" for nothing

}  // namespace attn::client
