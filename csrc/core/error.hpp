// The core's exceptions. A handful of types, each of which the bindings turn into one Python
// exception; the text says what was wrong, what was expected, and what to do.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace vramkit {

// Base of all: lets the bindings catch "ours" apart from the standard library's.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// An argument that can never be right (Python: ValueError).
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// An event of an allocation trace that cannot be right (Python: vramkit.errors.EventError, a
// ValueError). `event` is its index.
class EventError : public InvalidArgument {
 public:
  EventError(const std::string& what, std::int64_t event) : InvalidArgument(what), event_(event) {}
  std::int64_t event() const { return event_; }

 private:
  std::int64_t event_;
};

// A file whose content breaks its format (Python: vramkit.CheckpointError, a ValueError).
class CheckpointError : public Error {
 public:
  using Error::Error;
};

// The operating system refused: carries errno (Python: OSError with that errno).
class SystemError : public Error {
 public:
  SystemError(int code, const std::string& what) : Error(what), code_(code) {}
  int code() const { return code_; }

 private:
  int code_;
};

// A budget that cannot hold what was asked (Python: vramkit.BudgetError). `needed` is the
// smallest number of bytes that would have done.
class BudgetError : public Error {
 public:
  BudgetError(const std::string& what, std::int64_t needed) : Error(what), needed_(needed) {}
  std::int64_t needed() const { return needed_; }

 private:
  std::int64_t needed_;
};

// Memory that could not be had (Python: MemoryError). `bytes` is what was asked for.
class OutOfMemoryError : public Error {
 public:
  OutOfMemoryError(const std::string& what, std::int64_t bytes) : Error(what), bytes_(bytes) {}
  std::int64_t bytes() const { return bytes_; }

 private:
  std::int64_t bytes_;
};

// The same of a device's memory, or of memory made ready for a device (Python:
// vramkit.errors.DeviceMemoryError, a torch.OutOfMemoryError and a MemoryError).
class DeviceMemoryError : public OutOfMemoryError {
 public:
  using OutOfMemoryError::OutOfMemoryError;
};

// A device that failed at something other than memory (Python: vramkit.VramkitError). `code` is the
// device's own.
class DeviceError : public Error {
 public:
  DeviceError(int code, const std::string& what) : Error(what), code_(code) {}
  int code() const { return code_; }

 private:
  int code_;
};

// A file that is no longer what it was when it was opened (Python:
// vramkit.errors.FileChangedError).
class FileChangedError : public Error {
 public:
  using Error::Error;
};

// A wait that its caller broke off (Python: the exception that the signal's handler raised).
class Interrupted : public Error {
 public:
  using Error::Error;
};

}  // namespace vramkit
