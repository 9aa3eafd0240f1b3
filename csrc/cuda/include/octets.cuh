// The expansion table of unstructured weights: what an octet of columns takes of a lane's stream, by its mask byte and the parity of the
// half-words before it. Needs decode_common.cuh and expand.cuh before it.
//
// Entries come in two forms. Narrow ones are read with fewer conflicts, where few activation rows make shared memory what a kernel waits
// for; wide ones take fewer instructions and registers.
//   narrow, 32 bits   4j .. 4j + 2: what pair j takes, its kind; 16 + 4j .. 18 + 4j: the word of pair j; 3, 11, 19, 27: the octet's length
//   wide, 64 bits     8j .. 8j + 7: the word of pair j; 32 + 8j .. 33 + 8j and 36 + 8j .. 37 + 8j: what the low and the high half of pair j
//                     take, 0 nothing, 1 the word's low half, 2 its high half; 38, 46, 54, 62: the octet's length
// Words count from the one that the parity's half-word lies in, lengths are half-words, up to 9.
#pragma once

#ifndef WIDE_ENTRIES
#define WIDE_ENTRIES 1
#endif

#if WIDE_ENTRIES
typedef u64 Entry;
#else
typedef u32 Entry;
#endif
// TABLE_COPIES wide copies, or twice as many narrow ones, lie side by side.
#define ENTRY_COPIES (TABLE_COPIES * 8 / (u32)sizeof(Entry))
#define TABLE_BYTES (512 * 8 * TABLE_COPIES)

struct Table {
  Entry entries[512]; // two parities of each byte
};

__host__ __device__ constexpr Table make_table() {
  Table table = {};
  for (int byte = 0; byte < 256; ++byte)
    for (int parity = 0; parity < 2; ++parity) {
      int kept = 0, singles = 0;
      for (int j = 0; j < 4; ++j) {
        const int code = byte >> (2 * j) & 3;
        kept += (code + 1) / 2;
        singles += code == 1 || code == 2;
      }
      Entry entry = 0;
      int next = parity, open = parity - 1, seen = 0;
      for (int j = 0; j < 4; ++j) {
        const int code = byte >> (2 * j) & 3;
        int word = 0, kind = code; // 0 nothing, 1 the low half to the first column, 2 to the second, 3 both; 4, 5 as 1, 2 of the high half
        if (code == 3) {
          word = next++;
        } else if (code != 0) {
          ++seen;
          if (open >= 0) {
            word = open;
            kind += 3;
            open = -1;
          } else if (seen == singles) {
            word = (parity + kept - 1) >> 1; // without a partner
          } else {
            word = open = next++;
          }
        }
#if WIDE_ENTRIES
        const int low = kind == 1 || kind == 3 ? 1 : kind == 4 ? 2 : 0, high = kind == 2 ? 1 : kind == 3 || kind == 5 ? 2 : 0;
        entry |= (u64)word << (8 * j) | (u64)(low | high << 4) << (32 + 8 * j);
#else
        entry |= (u32)(kind | word << 16) << (4 * j);
#endif
      }
      // Pairs that keep both columns leave a free half behind.
      const int length = kept + (singles == 0 && kept != 0 ? parity : 0);
      for (int i = 0; i < 4; ++i)
        entry |= (Entry)(length >> i & 1) << (8 * i + (WIDE_ENTRIES ? 38 : 3));
      table.entries[2 * byte + parity] = entry;
    }
  return table;
}

__device__ const Table TABLE = make_table();

// Not to be moved towards its use.
__device__ __forceinline__ u32 load_entry(const u32* entry) {
  u32 v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(entry));
  return v;
}
__device__ __forceinline__ u64 load_entry(const u64* entry) {
  u64 v;
  asm volatile("ld.global.nc.u64 %0, [%1];" : "=l"(v) : "l"(entry));
  return v;
}

__device__ __forceinline__ void store_entry(u32 address, u32 v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void store_entry(u32 address, u64 v) {
  asm volatile("st.shared.u64 [%0], %1;" ::"r"(address), "l"(v) : "memory");
}

// A thread's share of the table on its way to shared memory. Its loads are issued together, before anything that waits for memory: a
// block's first unit may be there before a second such wait ends.
struct TableLoad {
  static constexpr u32 TURNS = (512 + THREADS - 1) / THREADS;
  Entry mine[TURNS];

  __device__ __forceinline__ void start() {
#pragma unroll
    for (u32 turn = 0; turn < TURNS; ++turn)
      mine[turn] = load_entry(&TABLE.entries[min((threadIdx.x & ~31u) + turn * THREADS, 480u) + (threadIdx.x & 31)]);
  }

  // Every thread of the block calls it.
  __device__ __forceinline__ void finish(u32 table) const {
    const u32 lane = threadIdx.x & 31;
#pragma unroll
    for (u32 turn = 0; turn < TURNS; ++turn) {
      const u32 first = (threadIdx.x & ~31u) + turn * THREADS;
      if (first >= 512) break;
#pragma unroll
      for (u32 i = 0; i < ENTRY_COPIES; ++i) {
        const u32 place = i * 32 + lane;
        store_entry(table + first * (8 * TABLE_COPIES) + place * (u32)sizeof(Entry),
                    __shfl_sync(0xffffffffu, mine[turn], place / ENTRY_COPIES));
      }
    }
  }
};

// Every thread of the block calls it.
__device__ __forceinline__ void fill_table(u32 table) {
  TableLoad load;
  load.start();
  load.finish(table);
}

// Address of this lane's copy.
__device__ __forceinline__ u32 own_table(u32 table) { return table + (threadIdx.x & 31) % ENTRY_COPIES * (u32)sizeof(Entry); }

__device__ __forceinline__ u32 load_word(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ u32 dot4(u32 bytes, u32 weights, u32 sum) {
  asm("dp4a.u32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(bytes), "r"(weights));
  return sum;
}

// The weights are signed.
__device__ __forceinline__ u32 dot4_signed(u32 bytes, u32 weights, u32 sum) {
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(bytes), "r"(weights));
  return sum;
}

// An octet as the steps that follow need it.
struct Octet {
  u32 places, kinds;
};

// The octet of the mask byte at bit `at`; `parity` is 0 or 64.
__device__ __forceinline__ Octet look_up_octet(u32 masks, int at, u32 parity, u32 own) {
  const u32 row = TABLE_COPIES == 8 ? (parity | own) : parity * TABLE_COPIES / 8 + own;
  const u32 address = dot4(masks, (u32)(16 * TABLE_COPIES) << at, row);
#if WIDE_ENTRIES
  u32 low, high;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(low), "=r"(high) : "r"(address) : "memory");
  return {low, high};
#else
  const u32 entry = load_word(address);
  return {entry, entry};
#endif
}

// Word of pair j for a lane that has come to the word at `base`. Words are 128 bytes apart, upwards if B.
template <bool B>
__device__ __forceinline__ u32 load_pair(const Octet& o, int j, u32 base) {
#if WIDE_ENTRIES
  const u32 places = o.places, weights = 0x80u << (8 * j); // of which -128 as a signed byte
#else
  // Odd places are stored times 16.
  const u32 places = o.places & (j % 2 ? 0x70700000u : 0x07070000u), weights = (j % 2 ? (B ? 0xf8u : 0x08u) : 0x80u) << (16 + j / 2 * 8);
#endif
  return load_word(B ? dot4_signed(places, weights, base) : dot4(places, weights, base));
}

// `position` behind the octet; half-words are 64 bytes apart.
template <bool B>
__device__ __forceinline__ u32 pass_octet(const Octet& o, u32 position) {
#if WIDE_ENTRIES
  const u32 length = o.kinds & 0x40404040u;
  return B ? dot4_signed(length, 0xf8fcfeffu, position) : dot4(length, 0x08040201u, position);
#else
  const u32 length = o.kinds & 0x08080808u;
  return B ? dot4_signed(length, 0xc0e0f0f8u, position) : dot4(length, 0x40201008u, position);
#endif
}

__device__ __forceinline__ u32 kinds_of(const Octet& o) { return WIDE_ENTRIES ? o.kinds : o.kinds & 0x7777u; }

// The four pairs from their words and kinds_of their octet; B has its halves exchanged.
template <bool B>
__device__ __forceinline__ void place_octet(const u32* words, u32 kinds, u32 (&a)[4]) {
#if WIDE_ENTRIES
  // Selector bytes by what a half takes.
  constexpr u32 TAKEN = B ? 0x00103244u : 0x00321044u;
  const u32 s0 = pick(TAKEN, TAKEN, kinds), s1 = pick(TAKEN, TAKEN, kinds >> 16);
  a[0] = permute(words[0], s0);
  a[1] = permute(words[1], s0 >> 16);
  a[2] = permute(words[2], s1);
  a[3] = permute(words[3], s1 >> 16);
#else
  // The low and the high bytes of the pairs' selectors, by their kinds.
  const u32 low = B ? pick(0x32443244u, 0x4410u, kinds) : pick(0x10441044u, 0x4432u, kinds);
  const u32 high = B ? pick(0x10324444u, 0x1044u, kinds) : pick(0x32104444u, 0x3244u, kinds);
#pragma unroll
  for (int j = 0; j < 4; ++j)
    a[j] = permute(words[j], pick(low, high, 0x40u + 0x11u * j));
#endif
}
