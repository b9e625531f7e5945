// What a layer asks before every call (cmd_ext/modules.py): does what it kept for this size of input still hold? In C,
// because the answer in Python takes as long as a small layer. Nothing here is a decision of its own: where the answer
// is not plainly yes, the layer goes the long way, which asks all of this again.
#pragma once

#include <Python.h>

namespace cmd_ext::kept {

// An owned reference; null where Python raised.
class Object {
 public:
  explicit Object(PyObject* owned) : object_(owned) {}
  Object(const Object&) = delete;
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_; }

 private:
  PyObject* object_;
};

// What a kept call depends on. Versions tell of changes in place, addresses of other data in a parameter; of the bias,
// which calls read, only the tensor itself is kept.
constexpr const char* kSources[] = {"u", "v", "values", "bias", "row_ptr", "col_idx"};
constexpr Py_ssize_t kCount = 6, kWeights = 3, kBias = 3, kParameters = 4;

struct Names {
  PyObject *kept, *noted, *parameters, *buffers, *sources[kCount];
};
inline const Names& names() {
  static const Names all = [] {
    const auto intern = [](const char* text) { return PyUnicode_InternFromString(text); };
    Names n{intern("_kept"), intern("_noted"), intern("_parameters"), intern("_buffers"), {}};
    for (Py_ssize_t i = 0; i < kCount; ++i) n.sources[i] = intern(kSources[i]);
    return n;
  }();
  return all;
}

// A property of torch.Tensor, or a method without arguments, found once and called past the look-up in the type.
class Property {
 public:
  explicit Property(const char* name) : name_(name) {}
  // A new reference; null where Python raised.
  PyObject* of(PyObject* object) {
    if (!type_ && !find(object)) return nullptr;
    if (!PyObject_TypeCheck(object, type_)) return PyErr_SetString(PyExc_TypeError, name_), nullptr;
    return get_ ? get_(object, closure_) : call_(object, nullptr);
  }

 private:
  bool find(PyObject* object) {
    PyObject* found = PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), name_);  // kept for good
    if (!found) return false;
    if (Py_TYPE(found) == &PyGetSetDescr_Type) {
      const auto* descriptor = reinterpret_cast<PyGetSetDescrObject*>(found);
      get_ = descriptor->d_getset->get, closure_ = descriptor->d_getset->closure, type_ = PyDescr_TYPE(descriptor);
    } else if (Py_TYPE(found) == &PyMethodDescr_Type) {
      const auto* descriptor = reinterpret_cast<PyMethodDescrObject*>(found);
      if (descriptor->d_method->ml_flags == METH_NOARGS)
        call_ = descriptor->d_method->ml_meth, type_ = PyDescr_TYPE(descriptor);
    }
    if (!type_) PyErr_SetString(PyExc_TypeError, name_);
    return type_;
  }

  const char* name_;
  PyTypeObject* type_ = nullptr;
  getter get_ = nullptr;
  void* closure_ = nullptr;
  PyCFunction call_ = nullptr;
};
inline Property version("_version"), address("data_ptr"), shape("shape"), dtype("dtype");

// Whether a result of Python equals a kept number; takes the reference.
inline bool equals(PyObject* owned, PyObject* kept) {
  const Object value(owned);
  return value && (value.get() == kept || PyObject_RichCompareBool(value.get(), kept, Py_EQ) == 1);
}

// Whether the sources of a state ((source, ...), (version, ...), (address, ...), ...) are the layer's own, unchanged.
inline bool holds(PyObject* layer, PyObject* state) {
  const Names& name = names();
  PyObject* parameters = PyDict_GetItemWithError(layer, name.parameters);
  PyObject* buffers = PyDict_GetItemWithError(layer, name.buffers);
  if (!parameters || !buffers || !PyDict_Check(parameters) || !PyDict_Check(buffers)) return false;
  PyObject *sources = PyTuple_GetItem(state, 0), *versions = PyTuple_GetItem(state, 1);
  PyObject* addresses = PyTuple_GetItem(state, 2);
  if (!sources || PyTuple_Size(sources) != kCount || !versions || PyTuple_Size(versions) != kCount - 1 || !addresses ||
      PyTuple_Size(addresses) != kWeights)
    return false;
  for (Py_ssize_t i = 0, k = 0; i < kCount; ++i) {
    PyObject* source = PyDict_GetItemWithError(i < kParameters ? parameters : buffers, name.sources[i]);
    if (!source || source != PyTuple_GET_ITEM(sources, i)) return false;
    if (i == kBias) continue;
    if (!equals(version.of(source), PyTuple_GET_ITEM(versions, k++))) return false;
    if (i < kWeights && !equals(address.of(source), PyTuple_GET_ITEM(addresses, i))) return false;
  }
  return true;
}

// A new reference to what the layer kept for inputs like x, or null.
inline PyObject* find(PyObject* layer, PyObject* x, PyObject* obstacles) {
  const Names& name = names();
  PyObject* kept = PyDict_GetItemWithError(layer, name.kept);
  if (!kept || !PyTuple_Check(kept) || PyTuple_GET_SIZE(kept) != 3) return nullptr;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(obstacles); ++i) {
    const Object answer(PyObject_CallNoArgs(PyTuple_GET_ITEM(obstacles, i)));
    if (!answer || PyObject_IsTrue(answer.get()) != 0) return nullptr;
  }
  const Object size(shape.of(x)), type(dtype.of(x));
  PyObject* noted = PyDict_GetItemWithError(layer, name.noted);
  if (!size || !type || !noted || PyObject_RichCompareBool(size.get(), noted, Py_EQ) != 1) return nullptr;
  const Object key(PyTuple_Pack(2, type.get(), size.get()));
  PyObject* calls = PyTuple_GET_ITEM(kept, 1);
  PyObject* call = key && PyDict_Check(calls) ? PyDict_GetItemWithError(calls, key.get()) : nullptr;
  if (!call) return nullptr;
  const Object held(Py_NewRef(call)), state(Py_NewRef(PyTuple_GET_ITEM(kept, 0)));
  return PyTuple_Check(state.get()) && holds(layer, state.get()) ? Py_NewRef(held.get()) : nullptr;
}

// kept_call(layer.__dict__, x, obstacles) -> what the layer kept for inputs like x, or None; None too where one of the
// functions in `obstacles` is true.
inline PyObject* kept_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyDict_Check(args[0]) || !PyTuple_Check(args[2])) {
    PyErr_SetString(PyExc_TypeError, "kept_call: wanted (dict, x, tuple of functions)");
    return nullptr;
  }
  PyObject* call = find(args[0], args[1], args[2]);
  if (call) return call;
  PyErr_Clear();  // the long way raises it again, if it is one
  Py_RETURN_NONE;
}

inline PyMethodDef kMethod{"kept_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kept_call)),
                           METH_FASTCALL, "What a layer kept for inputs like x, or None."};

}  // namespace cmd_ext::kept
