#include "core/model_files.h"

#include <limits.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <set>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "core/error.h"
#include "core/json.h"
#include "core/regular_file.h"

namespace attn {
namespace {

constexpr char kBadDirectory[] = "BAD_MODEL_DIRECTORY";
constexpr char kIndexName[] = "model.safetensors.index.json";
constexpr char kSuffix[] = ".safetensors";
constexpr std::size_t kMaxIndexBytes = std::size_t{64} << 20;
constexpr std::size_t kMaxWeightFiles = 4096;

absl::Status BadPath(const std::string& weights, const std::string& rule) {
  return MakeError(absl::StatusCode::kInvalidArgument, "BAD_PATH",
                   absl::StrCat("weights is ", Quoted(weights), ", ", rule),
                   {{"field", "weights"}});
}

absl::Status BadDirectory(const std::string& message) {
  return MakeError(absl::StatusCode::kInvalidArgument, kBadDirectory, message);
}

// realpath(3) with its errno; empty with `error` set where it fails.
std::string Canonical(const std::string& path, int& error) {
  char* resolved = realpath(path.c_str(), nullptr);
  if (resolved == nullptr) {
    error = errno;
    return "";
  }
  std::string result = resolved;
  free(resolved);
  return result;
}

bool IsUnder(const std::string& root, const std::string& path) {
  if (root.empty() || root == "/" || path == root) return true;
  return path.size() > root.size() && path.compare(0, root.size(), root) == 0 &&
         path[root.size()] == '/';
}

// Rules on the text alone, before the file system is asked: a refusal says nothing about what
// exists outside the root.
absl::Status CheckRelative(const std::string& weights) {
  if (weights.find('\0') != std::string::npos) return BadPath(weights, "which holds a NUL byte");
  if (weights.front() == '/') return BadPath(weights, "which is not relative to the model root");
  for (const auto& part : absl::StrSplit(weights, '/')) {
    if (part == "..") return BadPath(weights, "which may not contain \"..\"");
  }
  return absl::OkStatus();
}

bool IsWeightFile(const std::string& name) {
  const std::string suffix = kSuffix;
  return name.size() > suffix.size() && name.front() != '.' &&
         name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
}

// Names that stay in the directory and can stand in a message as they are.
bool IsPlainName(const std::string& name) {
  return std::all_of(name.begin(), name.end(), [](char c) {
    return c > ' ' && c <= '~' && c != '/' && c != '\\' && c != '"';
  });
}

}  // namespace

absl::StatusOr<ModelFiles> ModelFiles::Resolve(const std::string& model_root,
                                               const std::string& weights) {
  if (weights.empty())
    return InvalidField("weights", "weights is empty, where a directory is needed");
  int error = 0;
  std::string root;
  std::string path = weights;
  if (!model_root.empty()) {
    ATTN_RETURN_IF_ERROR(CheckRelative(weights));
    root = Canonical(model_root, error);
    if (root.empty()) return BadDirectory("the model root can't be read");
    path = absl::StrCat(root, "/", weights);
  }
  std::string directory = Canonical(path, error);
  if (directory.empty()) {
    if (error == ELOOP || error == ENAMETOOLONG) return BadPath(weights, "which does not resolve");
    return BadDirectory(absl::StrCat("weights is ", Quoted(weights), ", which can't be read: ",
                                     std::generic_category().message(error)));
  }
  if (!IsUnder(root, directory)) return BadPath(weights, "which leads out of the model root");
  struct stat status = {};
  if (stat(directory.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)) {
    return BadDirectory(absl::StrCat("weights is ", Quoted(weights), ", which is not a directory"));
  }
  return ModelFiles(std::move(root), std::move(directory));
}

absl::StatusOr<std::string> ModelFiles::PathOf(const std::string& name) const {
  int error = 0;
  std::string path = Canonical(absl::StrCat(directory_, "/", name), error);
  if (path.empty()) {
    return BadDirectory(
        error == ENOENT
            ? absl::StrCat(name, " is missing")
            : absl::StrCat(name, " can't be read: ", std::generic_category().message(error)));
  }
  if (!IsUnder(root_, path)) {
    return MakeError(absl::StatusCode::kInvalidArgument, "BAD_PATH",
                     absl::StrCat(name, " is a link that leads out of the model root"),
                     {{"field", "weights"}, {"file", name}});
  }
  return path;
}

absl::StatusOr<std::string> ModelFiles::Read(const std::string& name, std::size_t max_bytes) const {
  ATTN_ASSIGN_OR_RETURN(const std::string path, PathOf(name));
  return ReadRegularFile(path, name, kBadDirectory, max_bytes);
}

absl::StatusOr<std::vector<std::string>> ModelFiles::WeightFiles() const {
  // symlink_status: a dangling index is an error, not a directory without one.
  std::error_code error;
  const auto status = std::filesystem::symlink_status(directory_ + "/" + kIndexName, error);
  if (status.type() != std::filesystem::file_type::not_found) return IndexedFiles();
  return ListedFiles();
}

absl::StatusOr<std::vector<std::string>> ModelFiles::IndexedFiles() const {
  ATTN_ASSIGN_OR_RETURN(const std::string text, Read(kIndexName, kMaxIndexBytes));
  ATTN_ASSIGN_OR_RETURN(const nlohmann::json index,
                        ParseJsonObject(text, kIndexName, kBadDirectory));
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object() || map->empty()) {
    return BadDirectory(absl::StrCat(kIndexName, ": weight_map is missing, empty or no object"));
  }
  std::set<std::string> names;
  for (const auto& [tensor, file] : map->items()) {
    const std::string name = file.is_string() ? file.get<std::string>() : "";
    if (!IsWeightFile(name) || !IsPlainName(name)) {
      return BadDirectory(absl::StrCat(kIndexName, ": tensor ", Quoted(tensor), " is in ",
                                       JsonExcerpt(file), ", which is no plain name of a ", kSuffix,
                                       " file"));
    }
    names.insert(name);
    if (names.size() > kMaxWeightFiles) {
      return BadDirectory(absl::StrCat(kIndexName, ": more than ", kMaxWeightFiles, " files"));
    }
  }
  return std::vector<std::string>(names.begin(), names.end());
}

absl::StatusOr<std::vector<std::string>> ModelFiles::ListedFiles() const {
  std::vector<std::string> names;
  std::error_code error;
  auto entry = std::filesystem::directory_iterator(directory_, error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    std::string name = entry->path().filename().string();
    if (!IsWeightFile(name)) continue;
    if (!IsPlainName(name)) {
      return BadDirectory(absl::StrCat("the file name ", Quoted(name), " is not printable ASCII"));
    }
    if (names.size() == kMaxWeightFiles) {
      return BadDirectory(absl::StrCat("more than ", kMaxWeightFiles, " *", kSuffix, " files"));
    }
    names.push_back(std::move(name));
  }
  if (error) return BadDirectory("the directory can't be listed");
  if (names.empty()) return BadDirectory(absl::StrCat("the directory has no *", kSuffix, " file"));
  std::sort(names.begin(), names.end());
  return names;
}

absl::StatusOr<ModelTensors> ModelTensors::Open(const ModelFiles& files) {
  ATTN_ASSIGN_OR_RETURN(const std::vector<std::string> names, files.WeightFiles());
  ModelTensors tensors;
  for (const std::string& name : names) {
    ATTN_ASSIGN_OR_RETURN(const std::string path, files.PathOf(name));
    ATTN_ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file, SafetensorsFile::Open(path, name));
    for (const auto& [tensor, entry] : file->entries()) {
      if (!tensors.entries_.emplace(tensor, &entry).second) {
        return MakeError(
            absl::StatusCode::kInvalidArgument, kBadDirectory,
            absl::StrCat("tensor ", Quoted(tensor), " is in ", name, " and in another file too"),
            {{"tensor", tensor}});
      }
    }
    tensors.files_.push_back(std::move(file));
  }
  return tensors;
}

const SafetensorsEntry* ModelTensors::Find(const std::string& name) const {
  const auto found = entries_.find(name);
  return found == entries_.end() ? nullptr : found->second;
}

}  // namespace attn
