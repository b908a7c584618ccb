// The Python module tts_kernels._host: the KV forest and the attention planner over plain integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "forest.h"
#include "planner.h"

namespace py = pybind11;

namespace tts {
namespace {

using Ints = std::vector<int64_t>;

std::string type_name(py::handle value) { return Py_TYPE(value.ptr())->tp_name; }

[[noreturn]] void bad_type(const std::string& argument, const std::string& expected, py::handle got) {
    throw py::type_error(argument + ": expected " + expected + ", got " + type_name(got));
}

// ---- Arguments: sequences of int, if possible without a Python call for each entry
// -------------------------

// Ints with more than 64 bits become the nearest possible value, which is out of range for every use.
int64_t to_int64(py::handle value) {
    int overflow = 0;
    const long long result = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    if (overflow != 0) return overflow < 0 ? INT64_MIN : INT64_MAX;
    if (result == -1 && PyErr_Occurred()) throw py::error_already_set();
    return result;
}

// An int, or any other object with __index__, except a bool.
int64_t integer(py::handle value, const std::string& argument) {
    if (PyLong_CheckExact(value.ptr())) return to_int64(value);
    if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr())) bad_type(argument, "an int", value);
    const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!index) throw py::error_already_set();
    return to_int64(index);
}

std::string entry(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

Ints from_sequence(py::handle values, const char* name) {
    const auto fast = py::reinterpret_steal<py::object>(PySequence_Fast(values.ptr(), name));
    if (!fast) throw py::error_already_set();
    Ints result;
    result.reserve(static_cast<size_t>(PySequence_Fast_GET_SIZE(fast.ptr())));
    for (size_t i = 0; i < static_cast<size_t>(PySequence_Fast_GET_SIZE(fast.ptr())); ++i) {
        const py::handle item = PySequence_Fast_GET_ITEM(fast.ptr(), static_cast<Py_ssize_t>(i));
        if (PyLong_CheckExact(item.ptr())) {
            result.push_back(to_int64(item));
        } else {  // __index__ may run code that drops the item
            result.push_back(integer(py::reinterpret_borrow<py::object>(item), entry(name, i)));
        }
    }
    return result;
}

template <class Item>
Ints from_items(const py::buffer_info& info) {
    Ints result(static_cast<size_t>(info.shape[0]));
    const char* at = static_cast<const char*>(info.ptr);
    for (size_t i = 0; i < result.size(); ++i, at += info.strides[0]) {
        Item item;
        std::memcpy(&item, at, sizeof(item));  // NumPy arrays may be unaligned
        result[i] = std::in_range<int64_t>(item) ? static_cast<int64_t>(item) : INT64_MAX;
    }
    return result;
}

Ints from_buffer(py::handle values, const char* name) {
    const py::buffer_info info = py::reinterpret_borrow<py::buffer>(values).request();
    if (info.ndim != 1) {
        throw py::value_error(std::string(name) + ": expected one dimension, got " +
                              std::to_string(info.ndim));
    }
    const bool native = info.format.size() == 1 || info.format[0] == '@' || info.format[0] == '=' ||
                        (info.format[0] == '<' && PY_LITTLE_ENDIAN);
    const char kind = native && !info.format.empty() ? info.format.back() : '?';
    const bool is_signed = std::string("bhilqn").find(kind) != std::string::npos;
    if (!is_signed && std::string("BHILQN").find(kind) == std::string::npos) {
        throw py::type_error(std::string(name) + ": expected ints, got items of format '" + info.format +
                             "'");
    }
    switch (info.itemsize) {
        case 1:
            return is_signed ? from_items<int8_t>(info) : from_items<uint8_t>(info);
        case 2:
            return is_signed ? from_items<int16_t>(info) : from_items<uint16_t>(info);
        case 4:
            return is_signed ? from_items<int32_t>(info) : from_items<uint32_t>(info);
        default:
            return is_signed ? from_items<int64_t>(info) : from_items<uint64_t>(info);
    }
}

// A list, tuple, range or other sequence of int, or a one-dimensional buffer of them (array, NumPy).
Ints integers(py::handle values, const char* name) {
    if (PyObject_CheckBuffer(values.ptr())) return from_buffer(values, name);
    if (!PySequence_Check(values.ptr()) || PyUnicode_Check(values.ptr())) {
        bad_type(name, "a sequence of int", values);
    }
    return from_sequence(values, name);
}

std::optional<Ints> optional_integers(py::handle values, const char* name) {
    return values.is_none() ? std::nullopt : std::optional<Ints>(integers(values, name));
}

std::optional<std::span<const int64_t>> view(const std::optional<Ints>& values) {
    return values ? std::optional<std::span<const int64_t>>(*values) : std::nullopt;
}

// ---- Planning --------------------------------------------------------------------------------------------

PlanRules rules(bool gpu) { return gpu ? kGpuRules : PlanRules{}; }

// A new plan, or `out` after it was filled again.
py::object plan(const PlanTree& tree, const std::optional<Ints>& q_lens, const PlanShape& shape,
                py::object out) {
    if (out.is_none()) return py::cast(plan_attention(tree, view(q_lens), shape));
    refill_plan(tree, view(q_lens), shape, out.cast<PlanBuffer&>());
    return out;
}

py::object plan_forest(const Forest& forest, py::handle branches, py::handle q_lens, int64_t num_q_heads,
                       int64_t num_kv_heads, int64_t window, bool gpu, py::object out) {
    const Ints ids = integers(branches, "branches");
    const std::optional<Ints> rows = optional_integers(q_lens, "q_lens");
    const PlanTree tree = forest.plan_tree(ids);  // it points into the forest: no Python from here on
    return plan(tree, rows, {forest.page_size(), num_q_heads, num_kv_heads, rules(gpu), window},
                std::move(out));
}

// `address` points at int32 or int64 items (by item_size), with strides in items.
py::object plan_table(uintptr_t address, int64_t item_size, std::pair<int64_t, int64_t> shape,
                      std::pair<int64_t, int64_t> strides, py::handle kv_lens, py::handle q_lens,
                      int64_t page_size, int64_t num_q_heads, int64_t num_kv_heads, int64_t window, bool gpu,
                      py::object out) {
    const PageTableView table{.data = reinterpret_cast<const void*>(address),
                              .item_size = item_size,
                              .row_stride = strides.first,
                              .column_stride = strides.second,
                              .rows = shape.first,
                              .width = shape.second};
    const Ints lengths = integers(kv_lens, "kv_lens");
    const std::optional<Ints> rows = optional_integers(q_lens, "q_lens");
    const PlanTree tree = shared_prefixes(table, lengths, page_size);
    return plan(tree, rows, {page_size, num_q_heads, num_kv_heads, rules(gpu), window}, std::move(out));
}

// ---- The module ------------------------------------------------------------------------------------------

py::buffer_info int32_buffer(IntBuffer& buffer) {
    return {buffer.data(), sizeof(int32_t), "i", 1, {buffer.size()}, {sizeof(int32_t)}};
}

// Raises tts_kernels.OutOfPages with its numbers as attributes.
void translate_out_of_pages(py::module_& m) {
    static PyObject* type = PyErr_NewExceptionWithDoc(
        "tts_kernels.OutOfPages",
        "A forest has too few free pages for an append, which has changed nothing.\n\n"
        "Attributes\n----------\nneeded\n    Pages that the append needs.\nfree\n    Pages that are free.",
        PyExc_RuntimeError, nullptr);
    m.add_object("OutOfPages", py::reinterpret_borrow<py::object>(type));
    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const OutOfPages& error) {
            py::object raised = py::handle(type)(error.what());
            raised.attr("needed") = error.needed;
            raised.attr("free") = error.free;
            PyErr_SetObject(type, raised.ptr());
        }
    });
}

}  // namespace

PYBIND11_MODULE(_host, m) {
    m.doc() = "The KV forest and the attention planner over plain integers; use tts_kernels.KVForest.";
    translate_out_of_pages(m);

    py::class_<IntBuffer>(m, "IntBuffer", py::buffer_protocol(), "An array of int32.")
        .def("__len__", &IntBuffer::size)
        .def_buffer(&int32_buffer);

    py::class_<PlanBuffer>(m, "PlanBuffer", py::buffer_protocol(),
                           "A plan as one array of int32: its fields, `lengths` of them, one after another.")
        .def_property_readonly("lengths", [](const PlanBuffer& self) { return py::cast(self.lengths()); })
        .def_property_readonly("max_slots", &PlanBuffer::max_slots)
        .def_buffer([](PlanBuffer& self) { return int32_buffer(self.data()); });

    py::class_<Forest>(m, "Forest")
        .def(py::init([](py::handle num_pages, py::handle page_size) {
            return Forest(integer(num_pages, "num_pages"), integer(page_size, "page_size"));
        }))
        .def("add_root", &Forest::add_root)
        .def("append",
             [](Forest& self, py::handle branches, py::handle counts) {
                 Append result = self.append(integers(branches, "branches"), integers(counts, "counts"));
                 return py::make_tuple(std::move(result.slots), std::move(result.copy_src),
                                       std::move(result.copy_dst));
             })
        .def("fork", [](Forest& self, py::handle parents) { return self.fork(integers(parents, "parents")); })
        .def("free", [](Forest& self, py::handle branches) { self.free(integers(branches, "branches")); })
        .def("truncate",
             [](Forest& self, py::handle branch, py::handle length) {
                 self.truncate(integer(branch, "branch"), integer(length, "length"));
             })
        .def("length",
             [](const Forest& self, py::handle branch) { return self.length(integer(branch, "branch")); })
        .def("page_table",
             [](const Forest& self, py::handle branches) {
                 PageTable table = self.page_table(integers(branches, "branches"));
                 return py::make_tuple(std::move(table.pages), std::move(table.lengths), table.width);
             })
        .def("plan", &plan_forest)
        .def("stats", [](const Forest& self) {
            const ForestStats s = self.stats();
            return py::make_tuple(s.branches, s.pages_total, s.pages_free, s.logical_tokens, s.unique_tokens);
        });

    m.def("plan_table", &plan_table);
    m.attr("SEGMENT_INTS") = kSegmentInts;
    m.attr("TASK_INTS") = kTaskInts;
}

}  // namespace tts
