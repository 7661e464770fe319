"""Instructions of a GPU's machine code (SASS): their classes, and what a warp moves by them."""

import re
from dataclasses import dataclass

CLASSES = {
    "mma": "HGMMA QGMMA HMMA QMMA IMMA IGMMA DMMA UTCHMMA UTCQMMA UTCIMMA",
    "fma": "FFMA FMUL FADD FFMA2 FADD2 FMUL2 HADD2 HFMA2 HMUL2 FSWZADD",
    "imad": "IMAD IDP IDP4A UIMAD",
    "alu": "IADD3 IADD LOP3 LOP SHF SHL SHR ISETP FSETP HSETP2 SEL FSEL FMNMX FMNMX3 IMNMX PRMT LEA"
    " IABS PLOP3 VIMNMX VIMNMX3 BMSK SGXT VIADD VIADDMNMX P2R R2P FCHK F2FP I2FP HMNMX2 VABSDIFF"
    " ISCADD CSEL IMNMX3 VHMNMX",
    "fp64": "DADD DFMA DMUL DSETP",
    "move": "MOV MOV32I",
    "convert": "F2F F2I I2F F2IP I2IP FRND POPC FLO BREV",
    "mufu": "MUFU",
    "ldg": "LDG LD",
    "stg": "STG ST",
    "ldgsts": "LDGSTS",
    "lds": "LDS LDSM",
    "sts": "STS STSM",
    "tma": "UTMALDG UTMASTG UTMAREDG UTMAPF UBLKCP UBLKRED UBLKPF",
    "atomic": "ATOM ATOMG ATOMS RED REDG REDUX CREDUX UCGABAR_ARV UCGABAR_WAIT",
    "shuffle": "SHFL MOVM",
    "barrier": "BAR SYNCS WARPSYNC WARPGROUP",
    "fence": "MEMBAR FENCE ERRBAR CCTL",
    "local": "LDL STL",
}
CLASSES["control"] = (
    "BRA BRX JMP EXIT BSSY BSYNC NOP DEPBAR LDGDEPBAR UTMACMDFLUSH UTMACCTL S2R CS2R S2UR LDC LDCU"
    " CALL RET BREAK YIELD NANOSLEEP B2R R2B ELECT VOTE MATCH BMOV BPT KILL PREEXIT ACQBULK RPCMOV"
    " WARPEXIT LEPC"
)
KINDS = {opcode: kind for kind, opcodes in CLASSES.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Instruction:
    """One instruction: opcode "LDG.E.128", and (file, line) of its source where that is known."""

    text: str
    opcode: str
    source: tuple[str, int] | None

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """Its class: a key of CLASSES, "uniform" or "control".

        Raises:
            ValueError: no class has the opcode.
        """
        base = self.base
        if base in KINDS:
            kind = KINDS[base]
            # Moves and additions that the compiler gives to the multiplier are not multiplications.
            if base == "IMAD" and re.search(r"\.(MOV|SHL|IADD)", self.opcode):
                return "fma"
            return kind
        if base.startswith("U") or base in ("R2UR", "VOTEU"):
            return "uniform"
        raise ValueError(f"no class for the instruction {self.text!r}")

    @property
    def bits(self) -> int:
        """How wide an access of one thread is."""
        found = re.search(r"\.[US]?(128|64|16|8)\b", self.opcode)
        return int(found[1]) if found else 32

    @property
    def bytes(self) -> int:
        """Bytes that a warp moves with it; 0 for what moves none."""
        if self.base in ("LDSM", "STSM"):
            return 128 * int((re.search(r"\.([24])\b", self.opcode) or [0, 1])[1])
        return 4 * self.bits if self.kind in ("ldg", "stg", "ldgsts", "lds", "sts", "local") else 0

    @property
    def multiplications(self) -> float:
        """Multiply-adds on the tensor cores for one warp."""
        if found := re.match(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)", self.opcode):
            m, n, k = map(int, found.groups())
            return m * n * k / 4  # four warps issue it together
        if found := re.match(r"[HIQ]MMA\.(\d+)", self.opcode):
            shapes = {"1688": 16 * 8 * 8, "16816": 16 * 8 * 16, "16832": 16 * 8 * 32}
            return shapes[found[1]]
        return 0

    @property
    def operand_bytes(self) -> float:
        """Bytes of shared memory that a warp's part of a wgmma reads."""
        found = re.match(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)", self.opcode)
        if not found:
            return 0
        m, n, k = map(int, found.groups())
        size = 1 if self.opcode.startswith("Q") else 2
        operands = [part.strip() for part in self.text.partition("GMMA")[2].split(",")]
        in_registers = len(operands) > 2 and operands[1].startswith("R")
        return (n * k + (0 if in_registers else m * k)) * size / 4
