#include "client/cpp/benchmark_plot.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace attn::client {
namespace {

namespace v1 = attention::v1;

// In pixels.
constexpr double kWidth = 760;
constexpr double kTop = 56;
constexpr double kRow = 38;
constexpr double kBar = 20;
constexpr double kLeft = 170;
constexpr double kLongest = 400;  // of a whisker's end

constexpr size_t kMostText = 90;

// Text between tags: escaped, without what XML forbids, shortened.
std::string Escaped(const std::string& text) {
  std::string escaped;
  for (const char c : text.substr(0, kMostText)) {
    if (c == '&') {
      escaped += "&amp;";
    } else if (c == '<') {
      escaped += "&lt;";
    } else if (c == '>') {
      escaped += "&gt;";
    } else if (absl::ascii_isprint(static_cast<unsigned char>(c))) {
      escaped += c;
    } else {
      escaped += '?';
    }
  }
  return escaped;
}

// ASCII, which any XML reader takes for what it is.
std::string Time(double seconds) {
  if (seconds < 1e-3) return absl::StrFormat("%.1f us", seconds * 1e6);
  if (seconds < 1.0) return absl::StrFormat("%.2f ms", seconds * 1e3);
  return absl::StrFormat("%.2f s", seconds);
}

void AddText(std::string& svg, double x, double y, const std::string& attributes,
             const std::string& text) {
  absl::StrAppendFormat(&svg, "<text x=\"%.1f\" y=\"%.1f\" %s>%s</text>\n", x, y, attributes,
                        Escaped(text));
}

void AddWhisker(std::string& svg, double from, double to, double middle) {
  const auto line = [&svg](double x1, double y1, double x2, double y2) {
    absl::StrAppendFormat(
        &svg, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"#333333\"/>\n", x1,
        y1, x2, y2);
  };
  line(from, middle, to, middle);
  line(from, middle - 4, from, middle + 4);
  line(to, middle - 4, to, middle + 4);
}

}  // namespace

std::string BenchmarkSvg(const std::string& title, std::vector<v1::BenchmarkResult> results) {
  std::stable_sort(results.begin(), results.end(), [](const auto& a, const auto& b) {
    if (a.error().empty() != b.error().empty()) return a.error().empty();
    return a.median_seconds() < b.median_seconds();
  });
  double longest = 0;
  for (const v1::BenchmarkResult& result : results) {
    if (!result.error().empty()) continue;
    longest = std::max({longest, result.p95_seconds(), result.median_seconds()});
  }
  const double scale = longest > 0 ? kLongest / longest : 0;
  const double height = kTop + kRow * static_cast<double>(results.size()) + 28;
  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" "
      "viewBox=\"0 0 %.0f %.0f\" font-family=\"sans-serif\" font-size=\"13\">\n"
      "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
      kWidth, height, kWidth, height);
  AddText(svg, 16, 28, "font-size=\"15\" font-weight=\"bold\"", title);
  double y = kTop;
  for (const v1::BenchmarkResult& result : results) {
    const double middle = y + kBar / 2;
    AddText(svg, kLeft - 10, middle + 4, "text-anchor=\"end\"", result.implementation());
    if (!result.error().empty()) {
      AddText(svg, kLeft, middle + 4, "fill=\"#777777\"", result.error());
    } else {
      const double end = kLeft + result.median_seconds() * scale;
      absl::StrAppendFormat(
          &svg,
          "<rect class=\"bar\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" "
          "fill=\"%s\"/>\n",
          kLeft, y, std::max(end - kLeft, 1.0), kBar, y == kTop ? "#2f7d4f" : "#7a9cc6");
      const double far = kLeft + result.p95_seconds() * scale;
      AddWhisker(svg, kLeft + result.min_seconds() * scale, far, middle);
      AddText(svg, std::max(end, far) + 10, middle + 4, "", Time(result.median_seconds()));
    }
    y += kRow;
  }
  AddText(svg, kLeft, y + 10, "font-size=\"11\" fill=\"#777777\"",
          "bar: median; whisker: minimum to 95th percentile");
  return svg + "</svg>\n";
}

}  // namespace attn::client
