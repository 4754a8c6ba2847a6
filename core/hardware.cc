#include "core/hardware.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

#include "absl/strings/numbers.h"
#include "core/gpu_hardware.h"
#include "kernels/cpu/isa.h"

namespace attn {
namespace {

// The value behind "key : value" or "key: value kB" in a file of /proc.
std::string ReadField(const char* path, const std::string& key) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    if (line.compare(0, key.size(), key) != 0) continue;
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const std::size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

std::uint64_t ReadKilobytes(const std::string& key) {
  std::uint64_t kilobytes = 0;
  std::istringstream(ReadField("/proc/meminfo", key)) >> kilobytes;
  return kilobytes * 1024;
}

// The first word of a control-group file; "max" and a missing file are no limit.
bool ReadLimit(const std::string& path, std::uint64_t& value) {
  std::ifstream file(path);
  std::string word;
  return (file >> word) && absl::SimpleAtoi(word, &value);
}

// The folder of this process's control group (version 2); nested groups may each set limits.
std::vector<std::string> ControlGroups() {
  std::ifstream file("/proc/self/cgroup");
  std::string line;
  std::vector<std::string> folders;
  while (std::getline(file, line)) {
    if (line.compare(0, 3, "0::") != 0) continue;
    std::string path = line.substr(3);
    while (true) {
      folders.push_back("/sys/fs/cgroup" + path);
      const std::size_t slash = path.find_last_of('/');
      if (path.size() <= 1 || slash == std::string::npos) break;
      path.resize(slash);
    }
  }
  return folders;
}

int UsableCores(const std::vector<std::string>& groups) {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  for (const std::string& group : groups) {
    std::ifstream file(group + "/cpu.max");
    std::string quota;
    double period = 0.0;
    double granted = 0.0;
    if ((file >> quota >> period) && absl::SimpleAtod(quota, &granted) && period > 0.0) {
      cores = std::min(cores, static_cast<int>(std::ceil(granted / period)));
    }
  }
  return std::max(cores, 1);
}

// Of memory.stat: the page cache of a group, which gives way to whoever needs memory.
std::uint64_t ReclaimableBytes(const std::string& group) {
  std::ifstream file(group + "/memory.stat");
  std::string name;
  std::uint64_t value = 0;
  std::uint64_t bytes = 0;
  while (file >> name >> value) {
    if (name == "inactive_file" || name == "active_file") bytes += value;
  }
  return bytes;
}

std::uint64_t AvailableUnder(const std::vector<std::string>& groups) {
  std::uint64_t available = ReadKilobytes("MemAvailable");
  for (const std::string& group : groups) {
    std::uint64_t limit = 0;
    std::uint64_t used = 0;
    if (!ReadLimit(group + "/memory.max", limit)) continue;
    if (!ReadLimit(group + "/memory.current", used)) continue;
    used -= std::min(used, ReclaimableBytes(group));
    available = std::min(available, limit - std::min(limit, used));
  }
  return available;
}

class System final : public HardwareSource {
 public:
  HardwareDescription Describe() const override { return {DescribeCpu(), DescribeGpus()}; }
  std::string ActiveIsa() const override { return kernels::cpu::ActiveIsa().name; }
  std::uint64_t AvailableBytes() const override { return AvailableHostBytes(); }
};

}  // namespace

std::uint64_t AvailableHostBytes() { return AvailableUnder(ControlGroups()); }

std::shared_ptr<const HardwareSource> SystemHardware() {
  static const std::shared_ptr<const HardwareSource> system = std::make_shared<System>();
  return system;
}

CpuHardware DescribeCpu() {
  CpuHardware cpu;
  cpu.model = ReadField("/proc/cpuinfo", "model name");
  const std::vector<std::string> groups = ControlGroups();
  cpu.cores = UsableCores(groups);
  cpu.memory_bytes = ReadKilobytes("MemTotal");
  cpu.available_bytes = AvailableUnder(groups);
  for (const std::string& group : groups) {
    std::uint64_t limit = 0;
    if (ReadLimit(group + "/memory.max", limit)) {
      cpu.memory_bytes = std::min(cpu.memory_bytes, limit);
    }
  }
  const kernels::cpu::IsaTable isas = kernels::cpu::CompiledIsas();
  for (std::int64_t i = 0; i < isas.size; ++i) {
    if (isas.rows[i].supported()) cpu.features.emplace_back(isas.rows[i].name);
  }
  cpu.active = kernels::cpu::ActiveIsa().name;
  return cpu;
}

}  // namespace attn
