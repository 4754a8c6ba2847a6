// NumPy's .npy files (format versions 1 to 3), read into and written from the API's tensors: C
// order, little-endian. Files are not trusted: a header that lies is an error that says what is
// wrong, and no memory is taken for data that is not there.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "attention/v1/types.pb.h"

namespace attn::client {

struct NpyFile {
  attention::v1::Tensor tensor;  // its bytes inline
  std::string note;  // what the reader had to change (float64 became float32); mostly empty
};

// Reads '<f4' '<f2' '<i4' '<i8' '|b1', and bfloat16 as ml_dtypes saves it ('<V2', two opaque bytes:
// NumPy has no name of its own for it). '<f8' is rounded to float32, with a note. Fortran order,
// big-endian, object and structured arrays are refused with what to do about it.
// NOT_FOUND or INVALID_ARGUMENT, the path in the message.
absl::StatusOr<NpyFile> ReadNpy(const std::string& path);

// The same for a file that is in memory; `name` stands in messages.
absl::StatusOr<NpyFile> ParseNpy(const std::string& bytes, const std::string& name);

// Replaces the file. bfloat16 is written as '<V2': np.load(path).view(ml_dtypes.bfloat16).
// INVALID_ARGUMENT for a tensor whose bytes are not inline or do not match its shape.
absl::Status WriteNpy(const std::string& path, const attention::v1::Tensor& tensor);

// What WriteNpy writes before the data: magic, version, header text, padded so that data is
// aligned.
absl::StatusOr<std::string> NpyHeader(const attention::v1::Tensor& tensor);

}  // namespace attn::client
