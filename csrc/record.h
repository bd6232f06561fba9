// Structs of an operator's arguments, read member by member in the order of its schema.
#pragma once

#include <cstddef>
#include <utility>

namespace moment_ops {

template <class Record, class ValueAt, size_t... I>
inline Record read_record(const ValueAt& value_at, std::index_sequence<I...>) {
  return Record{value_at(I)...};
}

// `value_at(i)` is the i-th argument, and converts to what a member is.
template <class Record, class ValueAt>
inline Record read_record(const ValueAt& value_at) {
  return read_record<Record>(value_at, std::make_index_sequence<Record::kCount>());
}

}  // namespace moment_ops
