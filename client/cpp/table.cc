#include "client/cpp/table.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace attn::client {
namespace {

std::string Printable(std::string text) {
  for (char& c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) c = '?';
  }
  return text;
}

// Code points: every byte but UTF-8's continuations.
size_t Width(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  }));
}

// Three significant digits.
std::string Digits(double value) {
  const int decimals = value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return absl::StrFormat("%.*f", decimals, value);
}

std::string WithUnit(double value, double base, const std::vector<std::string>& units) {
  size_t unit = 0;
  // 999.5 would be printed as 1000.
  while (value >= base - 0.5 && unit + 1 < units.size()) {
    value /= base;
    ++unit;
  }
  const std::string digits = unit == 0 ? absl::StrFormat("%.0f", value) : Digits(value);
  return absl::StrCat(digits, units[unit].empty() ? "" : " ", units[unit]);
}

}  // namespace

Table::Table(std::vector<std::string> header) {
  if (!header.empty()) AddRow(std::move(header));
}

void Table::AddRow(std::vector<std::string> cells) {
  for (std::string& cell : cells) cell = Printable(std::move(cell));
  rows_.push_back(std::move(cells));
}

std::string Table::Render() const {
  std::vector<size_t> widths;
  for (const auto& row : rows_) {
    widths.resize(std::max(widths.size(), row.size()), 0);
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], Width(row[i]));
  }
  std::string text;
  for (const auto& row : rows_) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      line += row[i];
      if (i + 1 < row.size()) line.append(widths[i] - Width(row[i]) + 2, ' ');
    }
    line.erase(line.find_last_not_of(' ') + 1);
    absl::StrAppend(&text, line, "\n");
  }
  return text;
}

std::string BytesText(uint64_t bytes) {
  return WithUnit(static_cast<double>(bytes), 1024, {"B", "KiB", "MiB", "GiB", "TiB"});
}

std::string SecondsText(double seconds) {
  if (!(seconds > 0)) return "0 s";
  if (seconds < 0.9995e-3) return absl::StrCat(Digits(seconds * 1e6), " µs");
  if (seconds < 0.9995) return absl::StrCat(Digits(seconds * 1e3), " ms");
  if (seconds < 120) return absl::StrCat(Digits(seconds), " s");
  const auto whole = static_cast<int64_t>(std::min(seconds, 1e15));
  if (whole < 7200) return absl::StrCat(whole / 60, " min ", whole % 60, " s");
  return absl::StrCat(whole / 3600, " h ", whole / 60 % 60, " min");
}

std::string CountText(double count) { return WithUnit(count, 1000, {"", "k", "M", "G", "T", "P"}); }

std::string OrDash(const std::string& text) { return text.empty() ? "-" : text; }

}  // namespace attn::client
