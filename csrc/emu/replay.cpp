// Runs one recorded call of a function of mal_kernels.h, for a program built with a sanitizer.
//
// replay FUNCTION CALL: the file CALL holds little-endian int64 numbers: how many fields the struct
// has, then for each field its kind and its value: 0, the field itself; or 1, a length in bytes,
// and that many bytes follow, whose address the field becomes. They are written back in place.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace {

int64_t read_number(FILE* file) {
  int64_t number = 0;
  if (std::fread(&number, sizeof number, 1, file) != 1) std::abort();
  return number;
}

}  // namespace

int main(int, char** arguments) {
  FILE* file = std::fopen(arguments[2], "r+b");
  if (!file) return 2;
  std::vector<int64_t> fields(read_number(file));
  struct Buffer {
    long place;
    size_t bytes;
    std::unique_ptr<char[]> memory;  // of the very size, so that AddressSanitizer sees its end
  };
  std::vector<Buffer> buffers;
  for (int64_t& field : fields) {
    bool is_buffer = read_number(file);
    field = read_number(file);
    if (!is_buffer) continue;
    size_t bytes = field;
    buffers.push_back({std::ftell(file), bytes, std::unique_ptr<char[]>(new char[bytes])});
    Buffer& buffer = buffers.back();
    if (std::fread(buffer.memory.get(), 1, bytes, file) != bytes) std::abort();
    field = reinterpret_cast<int64_t>(buffer.memory.get());
  }
  using Function = int (*)(const void*);
  auto function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, arguments[1]));
  if (!function) return 3;
  int error = function(fields.data());
  for (const Buffer& buffer : buffers) {
    std::fseek(file, buffer.place, SEEK_SET);
    std::fwrite(buffer.memory.get(), 1, buffer.bytes, file);
  }
  std::fclose(file);
  return error;
}
