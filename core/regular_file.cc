#include "core/regular_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/error.h"

namespace attn {
namespace {

absl::Status FileError(absl::StatusCode code, const std::string& label, const std::string& reason,
                       const std::string& problem) {
  return MakeError(code, reason, absl::StrCat(label, " ", problem), {{"file", label}});
}

absl::Status SystemError(int error, const std::string& label, const std::string& reason) {
  const bool exhausted = error == EMFILE || error == ENFILE || error == ENOMEM;
  return FileError(
      exhausted ? absl::StatusCode::kResourceExhausted : absl::StatusCode::kInvalidArgument, label,
      reason, absl::StrCat("can't be read: ", std::generic_category().message(error)));
}

}  // namespace

absl::StatusOr<RegularFile> RegularFile::Open(const std::string& path, const std::string& label,
                                              const std::string& reason) {
  // O_NONBLOCK: opening a FIFO without a writer would wait for one for ever.
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (descriptor < 0) return SystemError(errno, label, reason);
  RegularFile file(descriptor, 0);
  struct stat status = {};
  if (fstat(descriptor, &status) != 0) return SystemError(errno, label, reason);
  if (!S_ISREG(status.st_mode)) {
    return FileError(absl::StatusCode::kInvalidArgument, label, reason, "is not a regular file");
  }
  file.bytes_ = static_cast<std::size_t>(status.st_size);
  return file;
}

RegularFile::RegularFile(RegularFile&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)), bytes_(other.bytes_) {}

RegularFile& RegularFile::operator=(RegularFile&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

RegularFile::~RegularFile() {
  if (descriptor_ >= 0) close(descriptor_);
}

absl::StatusOr<std::string> ReadRegularFile(const std::string& path, const std::string& label,
                                            const std::string& reason, std::size_t max_bytes) {
  ATTN_ASSIGN_OR_RETURN(const RegularFile file, RegularFile::Open(path, label, reason));
  if (file.bytes() > max_bytes) {
    return FileError(absl::StatusCode::kInvalidArgument, label, reason,
                     absl::StrCat("has ", file.bytes(), " bytes, more than ", max_bytes));
  }
  std::string text(file.bytes(), '\0');
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t got = read(file.descriptor(), text.data() + done, text.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return SystemError(errno, label, reason);
    if (got == 0) break;  // it became shorter since it was opened
    done += static_cast<std::size_t>(got);
  }
  text.resize(done);
  return text;
}

}  // namespace attn
