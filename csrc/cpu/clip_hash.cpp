// NH of the frames of a clip: see mal_kernels/hosts/clips.py, whose numbers these are.
#include "mal_cpu.h"

namespace mal {

// product of two words with theirs of the key: sums modulo 2^32, a signed product modulo 2^64
inline uint64_t mixed(uint32_t a, uint32_t key_a, uint32_t b, uint32_t key_b) {
  return uint64_t(int64_t(int32_t(a + key_a)) * int64_t(int32_t(b + key_b)));
}

// frames that lie beside each other, word by word
void hash_columns(const mal_cpu_clip_hash_args& args) {
  constexpr long BLOCK = 256;
  const long half = args.K / 2;
  for (long begin = 0; begin < args.T; begin += BLOCK) {
    const long count = args.T - begin < BLOCK ? args.T - begin : BLOCK;
    uint64_t sum[BLOCK] = {};
    for (long i = 0; i < half; i++) {
      const uint32_t* a = args.words + begin + i * args.step_k;
      const uint32_t* b = a + half * args.step_k;
      const uint32_t key_a = args.key[i], key_b = args.key[i + half];
      for (long t = 0; t < count; t++) sum[t] += mixed(a[t], key_a, b[t], key_b);
    }
    for (long t = 0; t < count; t++) args.hashes[begin + t] = sum[t];
  }
}

// words of a frame that lie beside each other
void hash_rows(const mal_cpu_clip_hash_args& args) {
  const long half = args.K / 2;
  for (long t = 0; t < args.T; t++) {
    const uint32_t *a = args.words + t * args.step_t, *b = a + half;
    uint64_t sum = 0;
    for (long i = 0; i < half; i++) sum += mixed(a[i], args.key[i], b[i], args.key[i + half]);
    args.hashes[t] = sum;
  }
}

}  // namespace mal

MAL_API int mal_cpu_clip_hash(const mal_cpu_clip_hash_args* args) {
  args->step_t == 1 ? mal::hash_columns(*args) : mal::hash_rows(*args);
  return 0;
}
