//! Lowering by instruction family: what the rows of [`super::isa`] cannot say.

mod arithmetic;
mod bulk;
mod call;
mod cluster;
mod compare;
mod control;
mod convert;
mod data;
mod exchange;
mod fence;
mod matrix;
mod mbarrier;
mod memory;
mod synchronise;
mod tensor;
mod wgmma;
mod wide;

use super::LowerErrorKind;
use super::builder::{Builder, Result};
use super::isa::BY_NAME;
use super::operands::count;
use super::{requirements, special};
use crate::lower::InstructionClass as Class;
use crate::ptx::ast::{Instruction, Operand};

/// Instructions that are PTX but that this device does not have, by the beginning of their opcode.
const REFUSED: &[(&str, &str)] = &[
    ("multimem", "there are no multicast objects"),
    ("istypep", "there are no textures, samplers and surfaces"),
    ("tex", "there are no textures"),
    ("tld4", "there are no textures"),
    ("txq", "there are no textures"),
    ("suld", "there are no surfaces"),
    ("sust", "there are no surfaces"),
    ("sured", "there are no surfaces"),
    ("suq", "there are no surfaces"),
    ("vadd", "video instructions"),
    ("vsub", "video instructions"),
    ("vabsdiff", "video instructions"),
    ("vmin", "video instructions"),
    ("vmax", "video instructions"),
    ("vshl", "video instructions"),
    ("vshr", "video instructions"),
    ("vmad", "video instructions"),
    ("vset", "video instructions"),
    ("alloca", "the stack has no dynamic part"),
    ("stack", "the stack has no dynamic part"),
    ("tcgen05", "an instruction of sm_100"),
    ("clusterlaunchcontrol", "an instruction of sm_100"),
    ("st.bulk", "an instruction of sm_100"),
];

fn is_special(name: &str) -> bool {
    name.starts_with('%') && special::find(name).is_some()
}

/// The instruction as written, without its operands.
fn spelling(i: &Instruction) -> String {
    std::iter::once(&i.opcode).chain(&i.modifiers).map(String::as_str).collect::<Vec<_>>().join(".")
}

fn unknown(i: &Instruction) -> LowerErrorKind {
    LowerErrorKind::UnknownInstruction(spelling(i))
}

impl Builder<'_> {
    /// One instruction under the current guard.
    pub fn instruction(&mut self, i: &Instruction) -> Result<()> {
        requirements::check(i, self.target, self.module.version)?;
        self.set_name(spelling(i));
        // PTX ISA 10: special registers are read with `mov` and `cvt`.
        if !matches!(i.opcode.as_str(), "mov" | "cvt")
            && let Some(Operand::Name(n)) = i.operands.iter().find(|o| matches!(o, Operand::Name(n) if is_special(n)))
        {
            return Err(LowerErrorKind::Invalid(format!(
                "`{}` reads the special register `{n}`: only `mov` and `cvt` do",
                i.opcode
            )));
        }
        if self.row(i)? {
            return Ok(());
        }
        self.class = Some(Class::Integer);
        match i.opcode.as_str() {
            "add" | "sub" | "mul" | "fma" | "mad" | "div" | "min" | "max" | "abs" | "neg" | "rcp" | "sqrt" | "addc"
            | "subc" | "madc" | "bfi" => self.arithmetic(i),
            "setp" => self.setp(i),
            "set" => self.set(i),
            "and" | "or" | "xor" | "not" => self.predicate_logic(i),
            "lop3" => self.lop3(i),
            "mov" => self.mov(i),
            "cvt" => self.cvt(i),
            "cvta" => self.cvta(i),
            "isspacep" => self.isspacep(i),
            "st" | "red" if i.modifiers.first().is_some_and(|m| m == "async") => self.store_async(i),
            "ld" | "ldu" | "st" => self.load_store(i),
            "atom" | "red" => self.atomic(i),
            "prefetch" | "prefetchu" | "applypriority" | "discard" => self.cache_hint(i),
            "createpolicy" => self.createpolicy(i),
            "cp" => self.copy_async(i),
            "shfl" => self.shfl(i),
            "vote" => self.vote(i),
            "match" => self.match_sync(i),
            "redux" => self.redux(i),
            "elect" => self.elect(i),
            "activemask" => self.activemask(i),
            "bar" | "barrier" => self.barrier(i),
            "mbarrier" => self.mbarrier(i),
            "tensormap" => self.tensormap(i),
            "griddepcontrol" => self.griddepcontrol(i),
            "mapa" => self.mapa(i),
            "getctarank" => self.getctarank(i),
            "membar" | "fence" => self.fence(i),
            "nanosleep" => self.nanosleep(i),
            "ldmatrix" | "stmatrix" => self.matrix_move(i),
            "movmatrix" => self.movmatrix(i),
            "mma" => self.mma(i),
            "wgmma" => self.wgmma(i),
            "setmaxnreg" => self.setmaxnreg(i),
            "bra" | "brx" | "ret" | "exit" | "trap" | "brkpt" | "call" | "pmevent" => self.control(i),
            _ => match REFUSED.iter().find(|(start, _)| i.opcode.starts_with(start)) {
                Some((_, why)) => Err(LowerErrorKind::Unsupported(format!("`{}`: {why}", spelling(i)))),
                None => Err(unknown(i)),
            },
        }
    }

    /// Lowers an instruction that is a row, if it is one.
    fn row(&mut self, i: &Instruction) -> Result<bool> {
        let Some(row) = BY_NAME.get(spelling(i).as_str()) else { return Ok(false) };
        if i.opcode == "mov" && i.operands.iter().any(|o| matches!(self.spread(o), Operand::Vector(_))) {
            return Ok(false);
        }
        count(&i.operands, row.sources.len() + 1..=row.sources.len() + 1)?;
        // Only conversions take registers wider than their types.
        if i.opcode == "cvt"
            && (self.dest(&i.operands[0], row.result).is_err() || {
                i.operands[1..].iter().zip(row.sources).any(|(o, ty)| self.source(o, *ty).is_err())
            })
        {
            return Ok(false);
        }
        self.class = Some(row.class);
        let mut sources = Vec::with_capacity(3);
        for (o, ty) in i.operands[1..].iter().zip(row.sources) {
            sources.push(self.source(o, *ty)?);
        }
        let d = self.dest(&i.operands[0], row.result)?;
        self.emit(row.code, d, &sources);
        Ok(true)
    }
}
