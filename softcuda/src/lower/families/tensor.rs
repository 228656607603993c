//! Tensor copies in tile mode (PTX ISA 9.7.9.27.1), `tensormap.replace` (9.7.9.28) and `tensormap.cp_fenceproxy` (9.7.13.16).

use super::bulk::{COMPLETE_TX, REDUCTIONS};
use super::memory::SCOPES;
use super::{Class, unknown};
use crate::lower::LowerErrorKind;
use crate::lower::builder::{Builder, Result};
use crate::lower::ir::{Address, Extra, Reg};
use crate::lower::ir_bulk::{BulkOp, TensorCopy, TensorDirection, TensormapOp};
use crate::lower::isa::Code;
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::{count, describe};
use crate::ptx::ast::{Instruction, Operand, Space, Type};
use crate::tensormap::Field;

const DIMENSIONS: &[(&str, usize)] = &[("1d", 1), ("2d", 2), ("3d", 3), ("4d", 4), ("5d", 5)];

impl Builder<'_> {
    /// `[map, {coordinates}]`
    fn tensor_operand(&mut self, o: &Operand, dimensions: usize) -> Result<(Address, Vec<Reg>)> {
        let wrong = |expected: &str| LowerErrorKind::Operand { expected: expected.into(), got: describe(o) };
        let Operand::TensorAddress { base, coordinates, rest } = o else {
            return Err(wrong("expected `[map, {coordinates}]`"));
        };
        if !rest.is_empty() {
            return Err(wrong("expected nothing after the coordinates"));
        }
        if coordinates.len() != dimensions {
            return Err(LowerErrorKind::Operand {
                expected: format!("expected {dimensions} coordinates"),
                got: coordinates.len().to_string(),
            });
        }
        let (map, space) = self.address(base)?;
        // A parameter's own address is not a generic one.
        if !matches!(space, None | Some(Space::Global | Space::Const)) {
            return Err(LowerErrorKind::Operand {
                expected: "expected a generic address of the tensor map".into(),
                got: describe(base),
            });
        }
        let coordinates = coordinates.iter().map(|c| self.source_reg(c, Type::S32)).collect::<Result<_>>()?;
        Ok((map, coordinates))
    }

    /// `cp.async.bulk.tensor` and `cp.reduce.async.bulk.tensor`, after `tensor` and what comes before has been taken.
    pub(super) fn tensor_copy(&mut self, i: &Instruction, mut m: Modifiers, reduces: bool) -> Result<()> {
        let dimensions = m.required("a number of dimensions", DIMENSIONS)?;
        let (to_space, from_space) = Self::directions(i, &mut m)?;
        let store = to_space == Space::Global;
        if store != (from_space == Space::Shared) || reduces && !store {
            return Err(unknown(i));
        }
        m.take("tile");
        let direction = if reduces {
            TensorDirection::Reduce(m.required("an operation", REDUCTIONS)?)
        } else if store {
            TensorDirection::Store
        } else {
            TensorDirection::Load
        };
        // Named before the completion mechanism is missed: im2col and the modes of later devices are not implemented.
        if let Some(mode) = i.modifiers.iter().find(|m| m.starts_with("im2col") || m.starts_with("tile::")) {
            return Err(LowerErrorKind::Unsupported(format!("tensor copies in mode `.{mode}`")));
        }
        if !m.take(if store { "bulk_group" } else { COMPLETE_TX }) {
            return Err(unknown(i));
        }
        let multicast = to_space == Space::SharedCluster && m.take("multicast::cluster");
        let (operands, policy) = self.without_policy(i, &mut m)?;
        m.finish()?;
        let n = 2 + usize::from(!store) + usize::from(multicast);
        count(operands, n..=n)?;
        let (tensor, tile) = if store { (&operands[0], &operands[1]) } else { (&operands[1], &operands[0]) };
        let (map, coordinates) = self.tensor_operand(tensor, dimensions)?;
        let tile = Some(self.address_in(tile, &[Space::Shared])?);
        let mbarrier = if store { None } else { Some(self.address_in(&operands[2], &[Space::Shared])?) };
        let multicast = if multicast { Some(self.source_reg(&operands[3], Type::B16)?) } else { None };
        let tile_space = if store { Space::Shared } else { to_space };
        let x = TensorCopy { direction, map, coordinates, tile, tile_space, mbarrier, multicast, policy };
        self.emit_bulk(BulkOp::Tensor(x));
        Ok(())
    }

    /// `cp.async.bulk.prefetch.tensor.dim.L2.global{.tile} [map, {coordinates}]`
    pub(super) fn tensor_prefetch(&mut self, i: &Instruction, mut m: Modifiers) -> Result<()> {
        let dimensions = m.required("a number of dimensions", DIMENSIONS)?;
        if !m.take("L2") || !m.take("global") {
            return Err(unknown(i));
        }
        if let Some(mode) = i.modifiers.iter().find(|m| m.starts_with("im2col") || m.starts_with("tile::")) {
            return Err(LowerErrorKind::Unsupported(format!("tensor prefetches in mode `.{mode}`")));
        }
        m.take("tile");
        let (operands, policy) = self.without_policy(i, &mut m)?;
        m.finish()?;
        count(operands, 1..=1)?;
        let (map, coordinates) = self.tensor_operand(&operands[0], dimensions)?;
        let direction = TensorDirection::Prefetch;
        let (tile, tile_space, mbarrier, multicast) = (None, Space::Shared, None, None);
        let x = TensorCopy { direction, map, coordinates, tile, tile_space, mbarrier, multicast, policy };
        self.emit_bulk(BulkOp::Tensor(x));
        Ok(())
    }

    pub(super) fn tensormap(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        if m.take("replace") { self.tensormap_replace(i, m) } else { self.tensormap_copy(i, m) }
    }

    fn emit_tensormap(&mut self, x: TensormapOp) {
        self.class = Some(Class::OtherMemory);
        self.emit_extra(Code::Tensormap, Extra::Tensormap(x));
    }

    /// `tensormap.replace.tile.field{.space}.b1024.type [map]{, ordinal}, value`
    fn tensormap_replace(&mut self, i: &Instruction, mut m: Modifiers) -> Result<()> {
        if !m.take("tile") {
            return Err(unknown(i));
        }
        // Each field with the number of ordinals it has, or the greatest immediate it takes.
        let name = m.required(
            "a field",
            &[
                ("global_address", ("global_address", 0, 0)),
                ("rank", ("rank", 0, 0)),
                ("box_dim", ("box_dim", 5, 0)),
                ("global_dim", ("global_dim", 5, 0)),
                ("global_stride", ("global_stride", 5, 0)),
                ("element_stride", ("element_stride", 5, 0)),
                ("elemtype", ("elemtype", 0, 12)),
                ("interleave_layout", ("interleave_layout", 0, 2)),
                ("swizzle_mode", ("swizzle_mode", 0, 3)),
                ("fill_mode", ("fill_mode", 0, 1)),
            ],
        )?;
        let (name, ordinals, immediate) = name;
        let space = m.one_of(&[("global", Space::Global), ("shared::cta", Space::Shared)]);
        let wide = matches!(name, "global_address" | "global_stride");
        let ty = if wide { Type::B64 } else { Type::B32 };
        if !m.take("b1024") || m.last_type()? != ty {
            return Err(unknown(i));
        }
        m.finish()?;
        let n = 2 + usize::from(ordinals > 0);
        count(&i.operands, n..=n)?;
        let range = |o: &Operand, end: i128| match o {
            Operand::Int(n) if (0..end).contains(n) => Ok(*n as usize),
            _ => Err(LowerErrorKind::Operand {
                expected: format!("expected a constant from 0 to {}", end - 1),
                got: describe(o),
            }),
        };
        let ordinal = if ordinals > 0 { range(&i.operands[1], ordinals)? } else { 0 };
        let value = &i.operands[n - 1];
        if immediate > 0 {
            range(value, immediate + 1)?;
        }
        let field = match name {
            "global_address" => Field::Address,
            "rank" => Field::Rank,
            "box_dim" => Field::BoxDim(ordinal),
            "global_dim" => Field::Dim(ordinal),
            "global_stride" => Field::Stride(ordinal),
            "element_stride" => Field::Step(ordinal),
            "elemtype" => Field::Element,
            "interleave_layout" => Field::Interleave,
            "swizzle_mode" => Field::Swizzle,
            _ => Field::Fill,
        };
        // Before PTX 8.5 the low four bits of a stride, which are zero, were not given (CUTLASS writes both forms).
        let shift = if name == "global_stride" && self.module.version < (8, 5) { 4 } else { 0 };
        let value = self.source_reg(value, ty)?;
        let (map, of_symbol) = self.address(&i.operands[0])?;
        let space = space.or(of_symbol);
        if !matches!(space, None | Some(Space::Global | Space::Shared)) {
            return Err(LowerErrorKind::Invalid("a tensor map is replaced in global or shared memory".into()));
        }
        self.emit_tensormap(TensormapOp::Replace { space, map, field, value, shift });
        Ok(())
    }

    /// `tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.scope.sync.aligned [to], [from], 128`
    fn tensormap_copy(&mut self, i: &Instruction, mut m: Modifiers) -> Result<()> {
        for name in ["cp_fenceproxy", "global", "shared::cta", "tensormap::generic", "release", "sync", "aligned"] {
            if !m.take(name) {
                return Err(unknown(i));
            }
        }
        let scope = m.required("a scope", SCOPES)?;
        m.finish()?;
        count(&i.operands, 3..=3)?;
        if i.operands[2] != Operand::Int(128) {
            return Err(LowerErrorKind::Operand {
                expected: "expected the size 128".into(),
                got: describe(&i.operands[2]),
            });
        }
        let to = self.address_in(&i.operands[0], &[Space::Global])?;
        let from = self.address_in(&i.operands[1], &[Space::Shared])?;
        self.emit_tensormap(TensormapOp::CopyFence { to, from, scope });
        Ok(())
    }
}
